"""The error of a model that cannot be described."""


class UnsupportedPartError(Exception):
    """A part of the model computes something that no description covers."""
