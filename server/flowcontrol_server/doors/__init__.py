"""The ports that Envoy connects to: ext_proc on grpcio or on our own HTTP/2, and the access log."""
