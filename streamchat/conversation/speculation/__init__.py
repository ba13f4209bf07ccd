"""Speculation without a draft model: proposes text that occurred before, and verifies several tokens per forward."""
