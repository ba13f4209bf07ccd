"""Imports torch and transformers without the parts that a chat does not use."""
