"""For models whose positions cannot be moved (learned, absolute): what is kept is read again after an eviction.

This is the paper's sliding window with re-computation (arXiv:2309.17453, table 1), not StreamingLLM: kept tokens no
longer carry what they had taken from evicted ones, and an eviction costs a prefill of what is kept. So it drops at
least half of the window at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streamchat.base.errors import CacheError, UnsupportedModelError
from streamchat.cache.arguments import parameter_names
from streamchat.cache.context import context_length
from streamchat.cache.fed_tokens import SeenIds
from streamchat.cache.layers.kinds import device_of, kind_of, refuse_unknown_layers
from streamchat.cache.layers.layer import LayerRotation
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.positions.probe import plain_forward
from streamchat.cache.streaming import StreamingCache

CHECK_TOKENS, CHECK_CUT = 16, 6


class RecomputingCache(StreamingCache):
    """A `StreamingCache` that keeps ids and lets the hook feed them again, with positions from 0.

    Args: as of `StreamingCache`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen = SeenIds()
        self._refill = 0
        """Tokens of the running forward that are read again."""
        self.fresh = 0
        """New tokens of the last forward; those before them were read again."""
        self.stale = False
        """The layers no longer hold what the ledger says; the next forward puts that right."""

    @property
    def next_position(self) -> int:
        """Position of the next token: positions are slots."""
        return self.length

    def refill(self, ids: Tensor) -> Tensor:
        """What to feed so that (batch, n) new `ids` are read: those, or after an eviction all that is kept and those.

        Raises:
            CacheError: The ids of kept tokens are not known.
        """
        self._refill = 0
        if not self.stale:
            return ids
        assert self.seen is not None
        if not self.seen.known:
            raise CacheError("a model with learned positions needs input_ids, not embeddings, to read them again")
        kept = self.seen.take(self.ledger.runs).to(ids.device)
        for layer in self.layers:
            layer.reset()
        self._refill = kept.shape[1]
        return torch.cat([kept, ids], dim=1)

    def discard_partial_forward(self) -> None:
        """As for every cache; layers that a failed refill left short are read again at the next forward."""
        super().discard_partial_forward()
        self.stale = self.stale or any(layer.length != self.length for layer in self.streaming_layers)

    def reset(self) -> None:
        """Empty everything."""
        super().reset()
        self.stale, self._refill = False, 0

    def count_read(self, count: int) -> None:
        super().count_read(count - self._refill)
        self.fresh = count - self._refill
        self.stale, self._refill = False, 0

    def set_positions_back(self) -> None:
        """Positions are slots already."""

    def _evict_from_layers(self, prefix: int, count: int) -> None:
        self.stale = True

    def _keep_positions_small(self, incoming: int) -> None:
        """Positions are slots, which the budget bounds."""

    def _block(self) -> int:
        return max(1, (self.cache_size - self.kept) // 2)


@torch.inference_mode()
def fit_recompute(model: Any, reason: str) -> PositionFit:
    """A fit for `RecomputingCache`, after a check that the model's cache can be rebuilt from ids.

    Args:
        model: A causal LM in eval mode. Three forwards of at most 16 tokens run.
        reason: Why its positions cannot be moved, for the message.

    Raises:
        UnsupportedModelError: Reading in pieces does not give what reading at once gives.
    """
    device = model.get_input_embeddings().weight.device
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(5, 5 + CHECK_TOKENS, device=device)[None] % vocabulary
    cache, whole = plain_forward(model, ids, None)
    refuse_unknown_layers(cache)
    if any(kind_of(layer) not in ("full", "sliding") for layer in cache.layers):
        raise UnsupportedModelError(f"{reason}, and its recurrent state cannot be rebuilt at each eviction")
    again, _ = plain_forward(model, ids[:, :CHECK_CUT], None)
    positions = None
    if "position_ids" in parameter_names(model):
        positions = torch.arange(CHECK_CUT, CHECK_TOKENS, device=device)[None]
    _, rest = plain_forward(model, ids[:, CHECK_CUT:], positions, again)
    spread = whole.std().item() or 1.0
    difference = (rest - whole[:, CHECK_CUT:]).square().mean().sqrt().item() / spread
    if difference > (1e-3 if model.dtype == torch.float32 else 0.2):
        raise UnsupportedModelError(
            f"{reason}, and reading a text in two pieces gives other results than at once (by {difference:.2g} of the "
            "logits' spread)"
        )
    layers = tuple(LayerRotation() for _ in cache.layers)
    devices = tuple(device_of(layer) for layer in cache.layers)
    return PositionFit(layers, devices, context_length(model.config), difference, "recompute")
