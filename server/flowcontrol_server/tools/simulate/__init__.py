"""Scenario files, and what a simulation of them measured."""
