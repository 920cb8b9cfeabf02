"""What can be seen of the engine: snapshots, explanations, and questions between turns."""
