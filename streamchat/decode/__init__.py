"""Decode steps, short paths that compute one token: torch operations, CUDA graphs and compiled kernels."""
