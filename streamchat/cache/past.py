"""Rebuilds an earlier state of a cache, equal to the bit, from cached and archived tokens.

A slot at the front that has an original always contains that original at the position of the slot, rounded. Every other
slot contains what a forward pass wrote, moved by each rebase since. The ledger, the position of the first slot, the
number of originals, and the form of the cache therefore determine a state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from streamchat.cache.checkpoint import CacheCheckpoint
from streamchat.cache.evicted import EvictedTokens
from streamchat.cache.eviction.ledger import Ledger
from streamchat.cache.eviction.policy import Run
from streamchat.cache.form import Form
from streamchat.cache.layers.layer import StreamingLayer
from streamchat.cache.layers.mover import Move
from streamchat.cache.layers.slots import (
    SlotState,
    originals_of,
    read_originals,
    read_slots,
)
from streamchat.cache.layers.storage import new_storage
from streamchat.cache.paging import can_page_in
from streamchat.cache.streaming import StreamingCache


@dataclass(frozen=True)
class PastState:
    """The bookkeeping of an earlier state of a cache."""

    runs: tuple[Run, ...]
    """Token log indices of its tokens."""
    next_index: int
    base: int
    """Absolute position of the first slot."""
    originals: int
    """Number of slots at the front that have originals."""
    form: Form
    pins: tuple[Run, ...] = ()
    turn_starts: tuple[int, ...] = ()
    compressions: int = 0

    @property
    def length(self) -> int:
        """Number of cached tokens."""
        return sum(stop - first for first, stop in self.runs)


@dataclass(frozen=True, eq=False)
class _Source:
    """Some tokens, and functions that return their content in a layer: a state whose first slot is slot 0."""

    runs: tuple[Run, ...]
    read: Callable[[int], SlotState]


@dataclass(frozen=True)
class _Piece:
    """`count` slots from slot `at` on, which are those of `source` from slot `start` on."""

    at: int
    count: int
    source: _Source
    start: int


def rebuild(cache: StreamingCache, past: PastState, archived: Sequence[EvictedTokens]) -> CacheCheckpoint | None:
    """Return an earlier state of `cache`, equal to the bit, for `checkpoint.restore`; None if parts of it are missing.

    Args:
        cache: The cache as it is now; not changed.
        past: The bookkeeping of the state.
        archived: Tokens that were archived since. Those of other generations, and rounded ones, are not used.
    """
    layers = cache.streaming_layers
    whole = can_page_in(cache) and set(cache.lengths) == {cache.length}
    if not past.form.generation or past.length > cache.cache_size or not whole or layers[0].storage is None:
        return None
    usable = [each for each in archived if each.is_exact and each.form.generation == past.form.generation]
    same = cache.form.generation == past.form.generation
    front, window = _split(past.runs, past.originals)
    originals = [_originals_of(each) for each in usable] + ([_cached_originals(cache)] if same else [])
    now = [(cache.form, "evicted", _cached_window(cache))] if same else []
    states = [*((each.form, each.part, _window_of(each)) for each in usable), *now]
    first = _cover(front, 0, originals)
    keys = _cover(window, past.originals, [source for form, _, source in states if form == past.form])
    # values, unless they carry positions, are the same after a rebase
    values = _cover(window, past.originals, [source for _, part, source in states if part != "rebased"])
    if first is None or keys is None or values is None:
        return None
    with torch.inference_mode(False), torch.no_grad():
        built = [_layer(i, layer, past, first, keys, values) for i, layer in enumerate(layers)]
    return CacheCheckpoint(
        {f"{index}.{name}": tensor for index, state in enumerate(built) for name, tensor in state.items()},
        (past.base,) * len(layers),
        past.runs,
        past.next_index,
        past.pins,
        past.turn_starts,
        past.compressions,
        form=past.form,
    )


def _split(runs: Sequence[Run], count: int) -> tuple[list[Run], list[Run]]:
    """Return the runs of the first `count` slots, and the others."""
    ledger = Ledger(list(runs))
    return ledger.evict(0, count), ledger.runs


def _originals_of(tokens: EvictedTokens) -> _Source:
    stacks = tokens.originals.stacks
    count = stacks[0][2].shape[3] if stacks else 0
    return _Source(tuple(_split(tokens.runs, count)[0]), tokens.originals.of)


def _window_of(tokens: EvictedTokens) -> _Source:
    """Return the tokens that had never been moved."""
    start = tokens.moved
    return _Source(tuple(_split(tokens.runs, start)[1]), lambda layer: _from(tokens.slots.of(layer), start))


def _cached_originals(cache: StreamingCache) -> _Source:
    layers = cache.streaming_layers
    count = layers[0].num_originals
    return _Source(tuple(_split(cache.ledger.runs, count)[0]), lambda layer: read_originals(layers[layer], 0, count))


def _cached_window(cache: StreamingCache) -> _Source:
    layers = cache.streaming_layers
    count = layers[0].num_originals
    return _Source(
        tuple(_split(cache.ledger.runs, count)[1]),
        lambda layer: read_slots(layers[layer], count, layers[layer].length),
    )


def _from(state: SlotState, first: int) -> SlotState:
    return {name: tensor[:, :, first:] for name, tensor in state.items()}


def _cover(wanted: Sequence[Run], at: int, sources: Sequence[_Source]) -> list[_Piece] | None:
    """Return where to read the tokens `wanted`, which belong into the slots from `at` on; None if some are missing."""
    left = list(zip(accumulate((stop - first for first, stop in wanted), initial=at), wanted, strict=False))
    pieces: list[_Piece] = []
    for source in reversed(sources):
        start = 0
        for first, stop in source.runs:
            rest: list[tuple[int, Run]] = []
            for slot, (a, b) in left:
                low, high = max(a, first), min(b, stop)
                if low >= high:
                    rest.append((slot, (a, b)))
                    continue
                pieces.append(_Piece(slot + low - a, high - low, source, start + low - first))
                rest += [(slot, (a, low))] if a < low else []
                rest += [(slot + high - a, (high, b))] if high < b else []
            left = rest
            start += stop - first
    return None if left else pieces


def _layer(
    index: int,
    layer: StreamingLayer,
    past: PastState,
    first: Sequence[_Piece],
    keys: Sequence[_Piece],
    values: Sequence[_Piece],
) -> SlotState:
    """Return the state of a layer, as `StreamingLayer.state` returned it then, on the CPU."""
    assert layer.storage is not None
    read = functools.cache(lambda source: source.read(index))  # several pieces have the same source
    state: SlotState = {}
    fixed = layer.rotation.values is None
    for name, part in layer.storage.raw(0, 1).items():
        state[name] = part.new_empty((*part.shape[:2], past.length, *part.shape[3:]), device="cpu")
        for piece in values if fixed and name.startswith("value") else keys:
            _copy(state[name], piece, read(piece.source)[name])
    if past.originals:
        state |= _front(read, layer, past, first, state)
    return state


def _front(
    read: Callable[[_Source], SlotState],
    layer: StreamingLayer,
    past: PastState,
    pieces: Sequence[_Piece],
    state: SlotState,
) -> SlotState:
    """Write the first slots of `state` from their originals; return the originals."""
    assert layer.storage is not None
    some = originals_of(read(pieces[0].source))
    both = [x.new_empty((*x.shape[:2], past.originals, x.shape[3]), device="cpu") for x in some]
    for piece in pieces:
        for whole, part in zip(both, originals_of(read(piece.source)), strict=True):
            _copy(whole, piece, part)
    moved = [x.to(layer.storage.device) for x in both]
    storage = new_storage(moved[0], moved[1], past.originals, layer.storage.dtype)
    rotations = (layer.rotation.keys, layer.rotation.values)
    layer.mover.write_slots(
        [
            Move(stored.raw(0, past.originals), x, rotation, past.base, stored.searches)
            for stored, x, rotation in zip(storage.both, moved, rotations, strict=True)
        ]
    )
    for name, part in storage.raw(0, past.originals).items():
        state[name][:, :, : past.originals] = part
    return {"original_keys": both[0], "original_values": both[1]}


def _copy(whole: Tensor, piece: _Piece, part: Tensor) -> None:
    whole[:, :, piece.at : piece.at + piece.count] = part[:, :, piece.start : piece.start + piece.count]
