"""Plots: SVG and PNG with matplotlib, and characters for a terminal. Nothing here knows models."""
