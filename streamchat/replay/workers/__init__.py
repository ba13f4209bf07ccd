"""A run of many conversations over worker processes, on this machine or on a Ray cluster."""
