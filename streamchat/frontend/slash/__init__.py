"""Slash commands: the registry and the commands themselves."""
