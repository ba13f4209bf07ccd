"""Screens of the app, each with its style sheet."""
