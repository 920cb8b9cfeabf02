"""Helpers that every package of the service may use; none of them deals with requests."""
