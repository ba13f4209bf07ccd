"""What was said, on disk: one SQLite database, snapshots of caches beside it. Knows neither torch nor a screen."""
