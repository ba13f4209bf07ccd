"""Decode steps, short paths that compute one token: eager torch, CUDA graphs and native kernels."""
