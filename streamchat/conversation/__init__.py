"""A conversation with a model: turns, encoding, decoding loop, undo and pins. One thread owns it."""
