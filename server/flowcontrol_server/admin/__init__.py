"""The interfaces for operators: the gRPC API, its guard and the dashboard."""
