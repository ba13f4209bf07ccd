"""A conversation with a model: turns, encoding, decoding loop, undo and pins. Owned by one thread."""
