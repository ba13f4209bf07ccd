"""Positions of cached tokens: measured at load, rotated after an eviction, and checked against the model."""
