"""Quantized weights: packing, linear layers that multiply by them, and their distance from the originals."""
