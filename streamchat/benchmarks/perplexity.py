"""Perplexity along a text under several policies: each document a stream of its own, under each policy anew."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from streamchat.benchmarks.policies import Policy
from streamchat.benchmarks.score import Scores, perplexity, score
from streamchat.benchmarks.streams import open_stream
from streamchat.benchmarks.texts import Tokens
from streamchat.cache.positions.fit import PositionFit


@dataclass(frozen=True)
class Scored:
    """One document under one policy."""

    policy: Policy
    document: Tokens
    scores: Scores

    @property
    def perplexity(self) -> float | None:
        """Of the whole document."""
        return perplexity(self.scores.losses)


def score_all(
    model: Any,
    fit: PositionFit,
    documents: Sequence[Tokens],
    policies: Sequence[Policy],
    chunk: int,
    tick: Callable[[Policy, Tokens, int], None],
) -> Iterator[Scored]:
    """Score every document under every policy, one after the other.

    Args:
        model: A causal LM in eval mode.
        fit: `choose_fit(model)`.
        documents: Of at least two ids each.
        policies: How the cache is kept.
        chunk: Tokens a forward for policies with a budget: room is made for so many at a time.
        tick: Told how many more tokens were fed.
    """
    device = model.get_input_embeddings().weight.device
    for policy in policies:
        for document in documents:
            ids = torch.tensor(document.ids, device=device)
            started = time.perf_counter()
            with open_stream(policy, model, fit, chunk) as stream:
                scores = score(stream, ids, lambda count, p=policy, d=document: tick(p, d, count))  # type: ignore[misc]
            yield Scored(policy, document, replace(scores, seconds=time.perf_counter() - started))


@dataclass(frozen=True)
class Segment:
    """A stretch of the stream, the same in all documents."""

    first: int
    """Index of its first token."""
    stop: int

    @property
    def name(self) -> str:
        """`512-1,023`."""
        return f"{self.first:,}-{self.stop - 1:,}"


def segments(length: int, size: int) -> list[Segment]:
    """Segments of `size` tokens that cover a stream of `length`."""
    return [Segment(first, min(first + size, length)) for first in range(0, length, size)]


def default_segment(length: int) -> int:
    """About eight segments, of a round number of tokens."""
    size = 16
    while size * 8 < length:
        size *= 2
    return size


def of_policy(results: Sequence[Scored], policy: Policy) -> list[Scored]:
    """Those of one policy."""
    return [result for result in results if result.policy == policy]


def losses_in(results: Sequence[Scored], segment: Segment) -> NDArray[np.float64]:
    """Losses of the tokens of a segment over these documents. The token with index i has loss i - 1."""
    parts = [result.scores.losses[max(0, segment.first - 1) : segment.stop - 1] for result in results]
    return np.concatenate(parts) if parts else np.empty(0)


def curve(results: Sequence[Scored], points: int, least: int) -> tuple[list[float], list[float]]:
    """Mean loss in nats over at most `points` equal stretches of at least `least` tokens: their ends, and means."""
    length = max((len(result.document.ids) for result in results), default=0)
    stretches = segments(length, max(least, -(-length // points)))
    xs, ys = [], []
    for stretch in stretches:
        losses = losses_in(results, stretch)
        known = losses[np.isfinite(losses)]
        xs.append(float(stretch.stop))
        ys.append(float(known.mean()) if len(known) else float("nan"))
    return xs, ys
