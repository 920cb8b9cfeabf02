"""The direct door: Envoy's ext_proc streams over our own HTTP/2, straight to the gate."""
