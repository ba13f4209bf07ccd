"""The front end for Python programs and notebooks: the public `Chat` object."""
