"""Doors into other people's stacks."""
