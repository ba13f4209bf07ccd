"""The engine: one owner thread for model and cache, requests in, events out."""
