"""Benchmarks: perplexity, speed and memory of streamchat and of alternatives."""
