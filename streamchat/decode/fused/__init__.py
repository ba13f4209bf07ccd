"""A decode step of fused Triton kernels, for CUDA. Importing `kernels` needs Triton; nothing else here does so early."""
