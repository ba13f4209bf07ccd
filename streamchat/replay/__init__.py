"""Replay of scripted conversations through the chat's cache: a soak test that checks invariants and writes a report."""
