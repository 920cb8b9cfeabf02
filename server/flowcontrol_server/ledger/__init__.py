"""The decision ledger on disk, and its replay."""
