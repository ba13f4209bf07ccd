"""Saved conversations: recording, snapshots, resuming, export and import."""
