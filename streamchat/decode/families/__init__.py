"""Readers of model families: from the model's own modules to a `ModelSpec`."""
