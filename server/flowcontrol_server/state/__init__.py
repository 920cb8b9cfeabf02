"""Requests in flight, stored outside the process, and the election among replicas."""
