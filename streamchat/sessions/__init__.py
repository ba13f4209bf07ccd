"""Saved sessions: recording, snapshots, resume, export and import."""
