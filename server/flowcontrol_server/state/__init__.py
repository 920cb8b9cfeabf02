"""What is in flight, kept outside the process, and which of several replicas decides."""
