"""Counts the tokens that the model is fed, below everything that reports such a number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from streamchat.conversation.feeder import Feeder


@dataclass
class FedTokens:
    """Tokens of all forward passes, without the padding of chunks."""

    count: int = 0


@contextmanager
def counted_tokens() -> Iterator[FedTokens]:
    """Count inside the block what any conversation of this process feeds with `Feeder.forward`."""
    fed, forward = FedTokens(), Feeder.forward
    depth = 0

    def counted(self: Feeder, ids: Sequence[int]) -> Tensor:
        nonlocal depth
        fed.count += len(ids) if not depth else 0  # a long chunk is fed in two calls
        depth += 1
        try:
            return forward(self, ids)
        finally:
            depth -= 1

    vars_of: type = Feeder
    vars_of.forward = counted  # type: ignore[attr-defined]
    try:
        yield fed
    finally:
        vars_of.forward = forward  # type: ignore[attr-defined]
