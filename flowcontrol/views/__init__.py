"""Read-only views of the engine: snapshots and explanations."""
