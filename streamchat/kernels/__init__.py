"""CPU decode kernels in C, compiled once on the user's machine. Falls back to PyTorch when no compiler is available."""
