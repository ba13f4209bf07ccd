"""Screens of the app, with their style sheets."""
