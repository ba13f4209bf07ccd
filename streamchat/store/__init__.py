"""Saved sessions on disk: one SQLite database with cache snapshots next to it. Needs neither torch nor a screen."""
