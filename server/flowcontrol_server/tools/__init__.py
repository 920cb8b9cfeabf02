"""Commands that do not serve."""
