"""Measuring and recording what a run does."""
