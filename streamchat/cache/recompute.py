"""For models with learned, absolute positions: after an eviction, the remaining tokens are prefilled again.

This is the paper's sliding window with re-computation (arXiv:2309.17453, table 1), not StreamingLLM: the remaining
tokens lose the influence of evicted ones, and each eviction costs a prefill. Therefore it drops at least half of the
window at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streamchat.base.errors import CacheError, UnsupportedModelError
from streamchat.cache.context import context_length
from streamchat.cache.fed_tokens import FedTokens
from streamchat.cache.layers.kinds import device_of, kind_of, refuse_unknown_layers
from streamchat.cache.layers.layer import LayerRotation
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.positions.probe import plain_forward
from streamchat.cache.streaming import StreamingCache
from streamchat.cache.token_ids import counting_ids, position_ids

CHECK_TOKENS, CHECK_CUT = 16, 6


class RecomputingCache(StreamingCache):
    """A `StreamingCache` that records ids, so that the hook can feed them again with positions from 0.

    Args: see `StreamingCache`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fed_tokens = FedTokens()
        self._refill = 0
        """Old tokens that the current forward prefills again."""
        self.fresh = 0
        """New tokens of the last forward."""
        self.stale = False
        """The layers do not match the ledger; the next forward refills them."""

    @property
    def next_position(self) -> int:
        """Position of the next token; positions equal slots."""
        return self.length

    def refill(self, ids: Tensor) -> Tensor:
        """Return the ids to feed for (batch, n) new `ids`: after an eviction, the remaining tokens come first.

        Raises:
            CacheError: The ids of the remaining tokens are not known.
        """
        self._refill = 0
        if not self.stale:
            return ids
        assert self.fed_tokens is not None
        if not self.fed_tokens.known:
            raise CacheError(
                "a model with learned positions is prefilled again after an eviction; call it with input_ids, not "
                "with embeddings"
            )
        remaining = self.fed_tokens.gather(self.ledger.runs).to(ids.device)
        for layer in self.layers:
            layer.reset()
        self._refill = remaining.shape[1]
        return torch.cat([remaining, ids], dim=1)

    def discard_partial_forward(self) -> None:
        """See the base class; if a failed refill left layers short, the next forward refills them."""
        super().discard_partial_forward()
        self.stale = self.stale or any(layer.length != self.length for layer in self.streaming_layers)

    def reset(self) -> None:
        """Empty everything."""
        super().reset()
        self.stale, self._refill = False, 0

    def advance(self, count: int) -> None:
        super().advance(count - self._refill)
        self.fresh = count - self._refill
        self.stale, self._refill = False, 0

    def rebase_positions(self, to: int = 0) -> None:
        """Do nothing: positions equal slots."""

    @property
    def _has_keys(self) -> bool:
        return super()._has_keys and not self.stale

    def _evict_from_layers(self, prefix: int, count: int) -> None:
        self.stale = True

    def _rebase_if_needed(self, incoming: int) -> None:
        """Do nothing: positions equal slots, which the budget bounds."""

    def _block(self) -> int:
        return max(1, (self.cache_size - self.num_retained) // 2)


@torch.inference_mode()
def fit_recompute(model: Any, reason: str) -> PositionFit:
    """Return a fit for `RecomputingCache`, after checking that the model's cache can be rebuilt from ids.

    Args:
        model: A causal LM in eval mode. Runs three forwards of at most 16 tokens.
        reason: Why its positions cannot be moved, for the error message.

    Raises:
        UnsupportedModelError: Prefill in two chunks gives other logits than in one.
    """
    ids = counting_ids(model, CHECK_TOKENS, 5)
    cache, whole = plain_forward(model, ids, None)
    refuse_unknown_layers(cache)
    if any(kind_of(layer) not in ("full", "sliding") for layer in cache.layers):
        raise UnsupportedModelError(f"{reason}, and its recurrent state cannot be rebuilt at each eviction")
    again, _ = plain_forward(model, ids[:, :CHECK_CUT], None)
    _, rest = plain_forward(model, ids[:, CHECK_CUT:], position_ids(model, CHECK_CUT, CHECK_TOKENS - CHECK_CUT), again)
    spread = whole.std().item() or 1.0
    difference = (rest - whole[:, CHECK_CUT:]).square().mean().sqrt().item() / spread
    if difference > (1e-3 if model.dtype == torch.float32 else 0.2):
        raise UnsupportedModelError(
            f"{reason}, and prefill in two chunks gives other logits than in one (they differ by {difference:.2g} of "
            "the logits' spread)"
        )
    layers = tuple(LayerRotation() for _ in cache.layers)
    devices = tuple(device_of(layer) for layer in cache.layers)
    return PositionFit(layers, devices, context_length(model.config), difference, "recompute")
