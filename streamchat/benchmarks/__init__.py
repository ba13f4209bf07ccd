"""Measuring: perplexity, speed and memory of streamchat and of the alternatives."""
