"""One module for each thing that parses; each has a `TARGET`."""
