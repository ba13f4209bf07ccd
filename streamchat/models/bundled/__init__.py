"""The default model: its download and its folder on disk."""
