"""Slash commands: the registry, and one module per subject."""
