"""Perplexity along a text under several methods. Each document is a separate stream under each method."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from streamchat.benchmarks.methods.registry import Method
from streamchat.benchmarks.methods.stream import open_stream
from streamchat.benchmarks.score import Scores, perplexity, score
from streamchat.benchmarks.texts import Tokens
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.token_ids import input_device


@dataclass(frozen=True)
class ScoredDocument:
    """One document under one method."""

    method: Method
    document: Tokens
    scores: Scores

    @property
    def perplexity(self) -> float | None:
        """Perplexity of the whole document."""
        return perplexity(self.scores.losses)


def score_all(
    model: Any,
    fit: PositionFit,
    documents: Sequence[Tokens],
    methods: Sequence[Method],
    chunk: int,
    tick: Callable[[Method, Tokens, int], None],
) -> Iterator[ScoredDocument]:
    """Score every document under every method, one after the other.

    Args:
        model: A causal LM in eval mode.
        fit: `choose_fit(model)`.
        documents: Documents of at least two ids each.
        methods: Ways to bound the cache.
        chunk: Tokens per forward pass for bounded methods, which evict for that many at a time.
        tick: Called with the number of tokens just fed.
    """
    device = input_device(model)
    for method in methods:
        for document in documents:
            ids = torch.tensor(document.ids, device=device)
            started = time.perf_counter()
            with open_stream(method, model, fit, chunk) as stream:
                scores = score(stream, ids, lambda count, p=method, d=document: tick(p, d, count))  # type: ignore[misc]
            yield ScoredDocument(method, document, replace(scores, seconds=time.perf_counter() - started))


@dataclass(frozen=True)
class Segment:
    """A range of tokens of the stream, the same in all documents."""

    first: int
    """Index of its first token."""
    stop: int

    @property
    def name(self) -> str:
        """First and last index: `512-1,023`."""
        return f"{self.first:,}-{self.stop - 1:,}"


def segments(length: int, size: int) -> list[Segment]:
    """Return segments of `size` tokens that cover a stream of `length`."""
    return [Segment(first, min(first + size, length)) for first in range(0, length, size)]


def default_segment(length: int) -> int:
    """Return a power of two that gives at most eight segments."""
    size = 16
    while size * 8 < length:
        size *= 2
    return size


def of_method(results: Sequence[ScoredDocument], method: Method) -> list[ScoredDocument]:
    """Return the results of one method."""
    return [result for result in results if result.method == method]


def losses_in(results: Sequence[ScoredDocument], segment: Segment) -> NDArray[np.float64]:
    """Return the losses of a segment's tokens over these documents. The token with index i has loss i - 1."""
    parts = [result.scores.losses[max(0, segment.first - 1) : segment.stop - 1] for result in results]
    return np.concatenate(parts) if parts else np.empty(0)


def curve(results: Sequence[ScoredDocument], points: int, least: int) -> tuple[list[float], list[float]]:
    """Return the ends and the mean losses (nats) of at most `points` equal segments of at least `least` tokens."""
    length = max((len(result.document.ids) for result in results), default=0)
    xs, ys = [], []
    for segment in segments(length, max(least, -(-length // points))):
        losses = losses_in(results, segment)
        known = losses[np.isfinite(losses)]
        xs.append(float(segment.stop))
        ys.append(float(known.mean()) if len(known) else float("nan"))
    return xs, ys
