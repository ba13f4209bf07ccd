"""Scripted conversations through the living cache: a soak test that proves its invariants and leaves a report."""
