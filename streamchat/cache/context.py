"""Reads the context length from a model's configuration."""

from __future__ import annotations

from typing import Any


def context_length(model_config: Any) -> int | None:
    """Return the context length in the model's configuration; None if it does not name one."""
    text_config = model_config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"):
        value = getattr(text_config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
