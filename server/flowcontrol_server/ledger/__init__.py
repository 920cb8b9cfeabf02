"""The decision ledger on disk, and deciding it again."""
