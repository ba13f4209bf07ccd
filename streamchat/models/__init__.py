"""Models: from a name to weights on a device. Importing this package loads no torch."""
