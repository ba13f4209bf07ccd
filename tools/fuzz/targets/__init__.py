"""One module for each parser; each has a `TARGET`."""
