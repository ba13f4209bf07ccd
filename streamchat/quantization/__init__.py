"""Quantized weights: quantization, linear layers that multiply by them, and their loss of quality."""
