"""Fewer bytes and fewer steps for each new token: packed weights and a short decode path."""
