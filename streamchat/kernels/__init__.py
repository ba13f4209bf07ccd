"""Kernels in C for one new token on a CPU, compiled once on the user's machine. Without a compiler PyTorch's serve."""
