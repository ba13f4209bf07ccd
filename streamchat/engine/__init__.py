"""The engine: one thread that owns model and cache, requests in, events out."""
