"""Teacher-forced scoring: the loss of each next token of a text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Scorable(Protocol):
    """A stream that returns logits."""

    @property
    def limit(self) -> int | None:
        """Maximum total tokens; None = unlimited."""

    @property
    def chunk(self) -> int:
        """Maximum tokens per forward pass."""

    @property
    def length(self) -> int:
        """Number of cached tokens, in the longest layer."""

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values."""

    def feed(self, ids: Tensor) -> Tensor:
        """Feed (n,) ids; return logits (n, vocabulary)."""


@dataclass(frozen=True)
class Scores:
    """Negative log-likelihoods of one document under one method."""

    losses: NDArray[np.float64]
    """(n - 1,) in nats: losses of tokens 1 .. n-1 of the ids; NaN if the model returned NaN or infinity."""
    unscorable: int
    """NaN values in `losses`, plus tokens beyond the method's limit."""
    longest: int
    """Maximum number of tokens in any layer at any time."""
    kv_bytes: int
    """Bytes allocated for keys and values at the end."""
    seconds: float = 0.0

    @property
    def counted(self) -> int:
        """Number of tokens with a loss."""
        return int(np.isfinite(self.losses).sum())


def score(stream: Scorable, ids: Tensor, tick: Callable[[int], None] = lambda count: None) -> Scores:
    """Feed (n,) `ids` and score all but the first, each given the cached tokens before it.

    Args:
        stream: A new stream.
        ids: At least two ids, on the model's device.
        tick: Called with the number of tokens just fed.
    """
    fed = ids if stream.limit is None else ids[: stream.limit]
    losses = np.full(max(0, len(fed) - 1), np.nan)
    longest, at, last = 0, 0, None
    for chunk in torch.split(fed, stream.chunk):
        logits = stream.feed(chunk)
        before = logits[:-1] if last is None else torch.cat([last, logits[:-1]])
        targets = chunk[1:] if last is None else chunk
        if len(targets):
            start = at if last is None else at - 1
            losses[start : start + len(targets)] = _losses(before, targets)
        last, at = logits[-1:], at + len(chunk)
        longest = max(longest, stream.length)
        tick(len(chunk))
    lost = int((~np.isfinite(losses)).sum())
    losses[~np.isfinite(losses)] = np.nan
    return Scores(losses, lost + len(ids) - len(fed), longest, stream.kv_bytes)


def _losses(logits: Tensor, targets: Tensor) -> NDArray[np.float64]:
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return losses.double().cpu().numpy()


def perplexity(losses: NDArray[np.float64]) -> float | None:
    """Return exp of the mean loss in nats; None if no token has a loss."""
    known = losses[np.isfinite(losses)]
    return math.exp(min(float(known.mean()), 700.0)) if len(known) else None
