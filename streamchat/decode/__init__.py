"""Short paths to compute one token: eager torch, CUDA graphs and native kernels."""
