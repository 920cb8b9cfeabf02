"""What people see and ask: the gRPC API, its guard, the dashboard."""
