"""Quantization of a loaded model on a CPU or a GPU, and the storage of its weights."""
