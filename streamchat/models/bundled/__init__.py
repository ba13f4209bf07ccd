"""The default model: where it is fetched from, and its place on disk."""
