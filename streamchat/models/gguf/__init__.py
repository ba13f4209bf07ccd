"""GGUF files: metadata, tokenizer, and conversion to a transformers model folder."""
