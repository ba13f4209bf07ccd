"""Descriptions of the supported model families, read from the modules of a model."""
