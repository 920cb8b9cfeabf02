"""The demo: the same traffic through a real Envoy, without and with flow control, side by side."""
