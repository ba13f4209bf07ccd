"""A decode step of fused Triton kernels, for CUDA; only `kernels` and `program` import Triton."""
