"""GGUF files: header, tokenizer, and conversion to a folder of transformers."""
