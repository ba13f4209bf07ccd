"""StreamingLLM as the paper states it, slowly, on any model of transformers. Shares no code with the product.

- `PaperReference`: keys are cached as they are before rotation. At every step, what is in the cache gets the positions
  0 .. n-1 and the model's own rotary function turns all of it (arXiv:2309.17453, 3.2).
- `RereadReference`: for learned positions; each forward reads exactly the kept ids, without a cache.
- `banded_logits`: without sinks, what was evicted can as well be masked: one forward over the whole text, no cache.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

Turn = Callable[[Tensor], Tensor]
"""Rotates (batch, heads, n, d) at positions 0 .. n-1."""


class RotaryTap:
    """Stands between a model and its rotary function: queries pass, keys stay as they are and can be turned later."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.module: Any = importlib.import_module(type(model).__module__)
        self.total = 0
        """Slots after the running forward."""
        self.turn: Turn | None = None
        """Turns all keys of the attention that runs; None where it does not rotate."""
        self.fresh: Tensor | None = None
        """The new keys as they were given to the rotary function, (batch, heads, n, d)."""
        self._heads_second: bool | None = None
        self._is_key = True

    @contextmanager
    def attached(self, total: int) -> Iterator[None]:
        """For one forward after which the cache holds `total` tokens."""
        self.total = total
        names = [n for n in vars(self.module) if n.startswith("apply_rotary") and "vision" not in n]
        originals = {name: getattr(self.module, name) for name in names}
        rotary = [m for m in self.model.modules() if "rotary" in type(m).__name__.lower()]
        handles = [m.register_forward_pre_hook(self._all_positions, with_kwargs=True) for m in rotary]
        for name, original in originals.items():
            setattr(self.module, name, self._tapped(original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(self.module, name, original)
            for handle in handles:
                handle.remove()

    def _all_positions(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Angles are made for the whole cache, not for the new tokens only."""

        def wide(value: Any) -> Any:
            whole = isinstance(value, Tensor) and not value.is_floating_point()
            return torch.arange(self.total)[None] if whole else value

        return tuple(wide(a) for a in args), {k: wide(v) for k, v in kwargs.items()}

    def _tapped(self, original: Callable[..., Any]) -> Callable[..., Any]:
        names = list(inspect.signature(original).parameters)
        if names[1] in ("sin", "cos"):
            return self._one_at_a_time(original)

        def both(q: Tensor, k: Tensor, *angles: Any, **more: Any) -> tuple[Tensor, Tensor]:
            new = self._new_tokens(k)
            turned = original(q, k, *(_newest(a, new) for a in angles), **{n: _newest(a, new) for n, a in more.items()})
            self._record(k, lambda keys: original(keys, keys, *angles, **more)[1])
            return turned[0], k

        return both

    def _one_at_a_time(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def single(x: Tensor, *angles: Tensor) -> Tensor:
            is_key, self._is_key = self._is_key, not self._is_key  # each attention turns its keys, then its queries
            if not is_key:
                turned: Tensor = original(x, *(_newest(a, x.shape[1]) for a in angles))
                return turned
            self._heads_second = False
            self._record(x, lambda keys: original(keys, *angles))
            return x

        return single

    def _new_tokens(self, k: Tensor) -> int:
        if self._heads_second is None:  # the first forward has many more tokens than heads
            self._heads_second = k.shape[2] > k.shape[1]
        return k.shape[2] if self._heads_second else k.shape[1]

    def _record(self, k: Tensor, turn: Turn) -> None:
        if self._heads_second:
            self.fresh, self.turn = k, turn
        else:
            self.fresh, self.turn = k.transpose(1, 2), lambda keys: turn(keys.transpose(1, 2)).transpose(1, 2)


def _newest(angles: Any, count: int) -> Any:
    """The last `count` positions of (1, n, pairs) angles."""
    return angles[:, -count:] if isinstance(angles, Tensor) else angles


class UnturnedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values as they came, before rotation; handed out turned."""

    is_sliding = False

    def __init__(self, tap: RotaryTap) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tap = tap
        self.raw: list[Tensor] = []
        self._place: tuple[int, int, int] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is allocated ahead."""
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.raw[0].shape[-2] if self.raw else 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; returns all keys and values with the positions of their slots."""
        self.is_initialized = True
        new = [key_states, value_states]
        self.raw = [torch.cat(pair, dim=-2) for pair in zip(self.raw, new, strict=True)] if self.raw else new
        out = list(self.raw)
        turn, fresh = self.tap.turn, self.tap.fresh
        self.tap.turn = self.tap.fresh = None
        if turn is not None and fresh is not None:
            if self._place is None:
                self._place = _find(fresh, new)
            which, first, stop = self._place
            x = out[which]
            out[which] = torch.cat([x[..., :first], turn(x[..., first:stop]), x[..., stop:]], dim=-1)
        self.keys, self.values = out
        return self.keys, self.values

    def drop(self, first: int, count: int) -> None:
        """Drop `count` slots from slot `first` on."""
        self.raw = [torch.cat([x[:, :, :first], x[:, :, first + count :]], dim=2) for x in self.raw]


def _find(fresh: Tensor, cached: list[Tensor]) -> tuple[int, int, int]:
    """Where the keys given to the rotary function are in (keys, values): tensor, first and last dimension."""
    width = fresh.shape[-1]
    for which, x in enumerate(cached):
        for first in {0, x.shape[-1] - width}:
            if first < 0 or x.shape[-2] != fresh.shape[-2]:
                continue
            part = x[..., first : first + width]
            # one head's rotated part may be shared by all (DeepSeek before it cached latents)
            if fresh.shape[1] in (1, x.shape[1]) and torch.equal(part, fresh.expand_as(part)):
                return which, first, first + width
    # Normalised behind the rotation, without weights: that commutes with it.
    assert cached[0].shape == fresh.shape
    return 0, 0, width


class UnturnedMixedLayer(LinearAttentionLayer, UnturnedLayer):  # type: ignore[misc, override, no-untyped-call]
    """The same beside a recurrent state."""

    def __init__(self, tap: RotaryTap, plain: Any) -> None:
        UnturnedLayer.__init__(self, tap)
        states = getattr(plain, "number_of_states", None)
        LinearAttentionLayer.__init__(self, **({} if states is None else {"number_of_states": states}))

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Two tensors: keys and values. Keywords: the states."""
        kind: Any = UnturnedLayer if args else LinearAttentionLayer
        kind.lazy_initialization(self, *args, **kwargs)


class Kept:
    """The rule of what stays: the first tokens and the newest ones."""

    def __init__(self, budget: int, sinks: int, block: int = 1) -> None:
        self.budget, self.sinks, self.block = budget, sinks, block
        self.indices: list[int] = []
        self.seen = 0

    def feed(self, count: int) -> int:
        """`count` tokens come; returns how many behind the sinks leave before them."""
        over = len(self.indices) + count - self.budget
        leave = min(max(over, self.block), len(self.indices) - self.sinks) if over > 0 else 0
        self.indices = self.indices[: self.sinks] + self.indices[self.sinks + leave :] if leave else self.indices
        self.indices = [*self.indices, *range(self.seen, self.seen + count)]
        self.seen += count
        return leave


def cache_name(model: Any) -> str:
    """How this version of transformers calls the cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class PaperReference:
    """Streams ids through any model that rotates its keys, or has no positions in them."""

    def __init__(self, model: Any, budget: int, sinks: int) -> None:
        self.model = model
        self.kept = Kept(budget, sinks)
        self.tap = RotaryTap(model)
        self.cache = DynamicCache(config=model.config)
        self.layers: list[UnturnedLayer] = []
        for i, layer in enumerate(self.cache.layers):
            mixed = type(layer) is LinearAttentionAndFullAttentionLayer
            if mixed or isinstance(layer, DynamicLayer):
                layer = UnturnedMixedLayer(self.tap, layer) if mixed else UnturnedLayer(self.tap)
                self.layers.append(layer)
                self.cache.layers[i] = layer

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        """Feed (1, n) ids as one chunk; logits (n, vocabulary)."""
        new = ids.shape[1]
        leave = self.kept.feed(new)
        for layer in self.layers:
            layer.drop(self.kept.sinks, leave)
        total = len(self.kept.indices)
        more: dict[str, Any] = {cache_name(self.model): self.cache}
        if "position_ids" in inspect.signature(self.model.forward).parameters:
            more["position_ids"] = torch.arange(total - new, total)[None]
        with self.tap.attached(total):
            logits: Tensor = self.model(input_ids=ids, use_cache=True, **more).logits[0]
        return logits


class RereadReference:
    """Streams ids by reading all that is kept at each step, without a cache.

    From one eviction to the next, a cache that was filled by reading the kept tokens holds the same.
    """

    def __init__(self, model: Any, budget: int, sinks: int) -> None:
        self.model = model
        self.kept = Kept(budget, sinks, block=(budget - sinks) // 2)
        self.ids = torch.empty(1, 0, dtype=torch.long)

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        """Feed (1, n) ids; logits (n, vocabulary)."""
        self.kept.feed(ids.shape[1])
        self.ids = torch.cat([self.ids, ids], dim=1)
        logits: Tensor = self.model(input_ids=self.ids[:, self.kept.indices], use_cache=False).logits[0]
        return logits[-ids.shape[1] :]


@torch.no_grad()
def banded_logits(model: Any, ids: Tensor, sizes: list[int], budget: int) -> Tensor:
    """Logits (n, vocabulary) of (1, n) ids in one forward in which every token sees what a cache without sinks holds.

    Args:
        model: One whose positions mean the same beyond the budget. The masks of its module are replaced meanwhile.
        ids: The whole text.
        sizes: The chunks in which a cache would be fed.
        budget: Tokens of such a cache.
    """
    count = ids.shape[1]
    first = torch.empty(count, 1, dtype=torch.long)
    at = 0
    for size in sizes:
        first[at : at + size] = max(0, at + size - budget)
        at += size
    index = torch.arange(count)
    visible = (index[None] <= index[:, None]) & (index[None] >= first)
    window = getattr(model.config, "sliding_window", None)

    def mask(seen: Tensor) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]

    masks = {"create_causal_mask": mask(visible)}
    if window is not None:
        masks["create_sliding_window_causal_mask"] = mask(visible & (index[None] > index[:, None] - window))
    module = importlib.import_module(type(model).__module__)
    originals = {name: getattr(module, name) for name in masks if hasattr(module, name)}
    assert originals
    for name in originals:
        setattr(module, name, masks[name])
    try:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    finally:
        for name, original in originals.items():
            setattr(module, name, original)
    return logits
