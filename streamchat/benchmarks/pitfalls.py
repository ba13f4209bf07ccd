"""`streamchat verify --show-pitfalls`: the two classic mistakes and the correct method on the same text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from streamchat.benchmarks.methods.registry import make_method
from streamchat.benchmarks.methods.stream import ModelStream, open_stream
from streamchat.cache.context import context_length
from streamchat.verify.run import PitfallResult, Verification

CHUNK = 8
"""Tokens per forward, the same for all methods."""
METHODS = {
    "nothing evicted": "dense",
    "forward hook on cache.key_cache": "key-lists",
    "keys cut, positions left alone": "no-rerotation",
    "streamchat": "sinks",
}


def run_pitfalls(model: Any, ids: Sequence[int], result: Verification) -> list[PitfallResult]:
    """Score `ids` under each method, with the sizes and the fit of a verification.

    Args:
        model: A causal LM in eval mode, without our hooks.
        ids: A text of more than `cache_size` + 8 tokens.
        result: The verification of the model.
    """
    ids = ids[: context_length(model.config) or len(ids)]
    found = []
    for name, kind in METHODS.items():
        method = make_method(kind, result.cache_size, result.num_sink_tokens)
        with open_stream(method, model, result.fit) as stream:
            perplexity = _score(stream, stream.tensor(ids), result.cache_size)
            found.append(PitfallResult(name, stream.compressions, stream.length, stream.kv_bytes, perplexity))
    return found


def _score(stream: ModelStream, ids: Tensor, first: int) -> float:
    """Return the perplexity of the tokens from index `first` on, fed in chunks."""
    total, count, at = 0.0, 0, 0
    for chunk in torch.split(ids[:-1], CHUNK):
        logits = stream.feed(chunk).float()
        at += len(chunk)
        scored = torch.arange(at - len(chunk) + 1, at + 1, device=ids.device) >= first
        losses = torch.nn.functional.cross_entropy(logits, ids[at - len(chunk) + 1 : at + 1], reduction="none")
        total += losses[scored].double().sum().item()
        count += int(scored.sum())
    return math.exp(min(total / max(count, 1), 700.0))
