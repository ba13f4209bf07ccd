"""Settings and keys: declarations, configuration files, environment variables, and trust in `./config.toml`."""
