"""The configuration file: its sections, their defaults, differences, and reloading."""
