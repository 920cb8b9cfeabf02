"""The Envoy configuration that fits the service's own."""
