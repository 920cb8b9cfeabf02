"""What Envoy connects to: ext_proc on grpcio, ext_proc on our own HTTP/2, the access log."""
