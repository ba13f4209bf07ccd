"""Positions of cached tokens: measured when a model loads, checked against it, and rotated after an eviction."""
