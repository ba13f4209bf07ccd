"""Compares logits, for the checks when a model loads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from streamchat.cache.arguments import cache_keyword


def logit_distance(found: Tensor, expected: Tensor) -> float:
    """Return the root mean square difference, in units of the spread of `expected`; inf if any is not finite."""
    found, expected = found.float(), expected.float()
    if not bool(torch.isfinite(found).all() and torch.isfinite(expected).all()):
        return float("inf")
    return ((found - expected).square().mean().sqrt() / expected.std().clamp_min(1e-9)).item()


def logits_in_pieces(model: Any, forward: Callable[..., Any], ids: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Return the (n, vocabulary) float32 logits of each piece of a text that a plain cache gets.

    Args:
        model: A causal LM in eval mode.
        forward: Its forward.
        ids: (1, tokens).
        sizes: Tokens of each piece.
    """
    cache = DynamicCache(config=model.config)
    return [
        forward(input_ids=piece, use_cache=True, **{cache_keyword(model): cache}).logits[0].float()
        for piece in torch.split(ids, list(sizes), dim=1)
    ]
