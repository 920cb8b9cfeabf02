"""The decision ledger: its format, deciding it again, and comparing two engines on it."""
