"""Settings and keys: their tables, the files and variables they come from, and trust in `./config.toml`."""
