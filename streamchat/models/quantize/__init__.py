"""Quantizing a loaded model: on a CPU, on a GPU, and how its weights are stored."""
