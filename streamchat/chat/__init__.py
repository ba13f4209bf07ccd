"""The chat engine: turns, templates, decoding and the event stream. Knows nothing of any screen."""
