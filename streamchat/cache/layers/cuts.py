"""Saves what an eviction or a rebase overwrites in the layers, and undoes it to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamchat.cache.layers.fronts import write_fronts
from streamchat.cache.layers.layer import StreamingLayer
from streamchat.cache.layers.slots import (
    CopiedStates,
    SlotState,
    copied,
    open_front,
    originals_of,
    read_originals,
    read_slots,
    set_originals,
    write_slots,
)


@dataclass(frozen=True)
class StateBefore:
    """What a change of all layers overwrites: the content of slots, and the bookkeeping before the change."""

    slots: CopiedStates
    """The slots that an eviction drops; none for other changes."""
    originals: CopiedStates
    """The originals of those slots, if they have some."""
    moved: CopiedStates
    """The slots from `written` on that the change rewrites."""
    base: int
    """Absolute position of the first slot."""
    written: int
    known: int
    """Number of originals."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.slots.nbytes + self.originals.nbytes + self.moved.nbytes


def save_cut(layers: Sequence[StreamingLayer], at: int, count: int, front: int) -> StateBefore:
    """Save what an eviction of slots from slot `at` on overwrites. O(saved slots).

    The eviction also moves the slots before `at`. Those that were once written from their originals can be written from
    them again, so only the others are saved.

    Args:
        layers: The layers before the eviction.
        at: The first slot to evict.
        count: Number of evicted slots to save, starting with the first one.
        front: Number of slots before `at` to save.
    """
    slots, originals = CopiedStates(), CopiedStates()
    if count:
        slots = copied([read_slots(layer, at, at + count) for layer in layers])
        originals = copied([read_originals(layer, at, at + count) for layer in layers])
    moved = copied([_unwritten(layer, front) for layer in layers])
    return _state(layers, slots, originals, moved)


def save_rebase(layers: Sequence[StreamingLayer], front: int) -> StateBefore:
    """Save what a rebase overwrites in the first `front` slots: their keys, which it rotates in place. O(front)."""
    moved = copied([_rotated(layer, _unwritten(layer, front)) for layer in layers])
    return _state(layers, CopiedStates(), CopiedStates(), moved)


def undo_cut(layers: Sequence[StreamingLayer], before: StateBefore, at: int, count: int, keep: int) -> None:
    """Undo the eviction of `count` slots from slot `at` on. O(restored slots and those before them).

    Args:
        layers: The layers after the eviction; their newest slots may have been removed since.
        before: The result of `save_cut`.
        at: The first evicted slot.
        count: The number of evicted slots.
        keep: Number of evicted slots to restore. The others were newer than a token that was removed since.
    """
    for i, layer in enumerate(layers):
        if layer.storage is None or layer.length + keep == 0:
            continue
        first = min(at, layer.length)
        open_front(layer, keep)
        _put_back_originals(layer, before, i, first, count, keep)
        layer.start -= keep
        layer.base = before.base
        if keep:
            write_slots(layer, first, {name: tensor[:, :, :keep] for name, tensor in before.slots.of(i).items()})
    rewrite(layers, before, at)


def undo_rebase(layers: Sequence[StreamingLayer], before: StateBefore) -> None:
    """Undo a rebase; the newest slots may have been removed since."""
    for layer in layers:
        if layer.storage is not None and layer.length:
            layer.base = before.base
    rewrite(layers, before, max(layer.length for layer in layers))


def _put_back_originals(layer: StreamingLayer, before: StateBefore, index: int, at: int, count: int, keep: int) -> None:
    """Restore the originals of the slots that had some before the cut, and drop those that the cut created."""
    states = [read_originals(layer, 0, min(at, before.known))]
    if before.known > at:
        states.append({name: tensor[:, :, :keep] for name, tensor in before.originals.of(index).items()})
        states.append(read_originals(layer, at, max(at, before.known - count)))
    set_originals(layer, [originals_of(state) for state in states if state])


def rewrite(layers: Sequence[StreamingLayer], before: StateBefore, stop: int) -> None:
    """Write the first `stop` slots of each layer, if it has as many, as they were at position `before.base`."""
    first = layers[0]  # lengths and numbers of originals are the same in all layers
    stop = min(stop, first.length)
    write_fronts(layers, min(before.written, stop, first.num_originals))
    left = stop - before.written
    for i, layer in enumerate(layers):
        layer.written = min(before.written, layer.length)
        if left > 0:
            moved = before.moved.of(i)
            write_slots(layer, before.written, {name: tensor[:, :, :left] for name, tensor in moved.items()})


def _state(
    layers: Sequence[StreamingLayer], slots: CopiedStates, originals: CopiedStates, moved: CopiedStates
) -> StateBefore:
    first = layers[0]  # positions and copies are the same in all layers
    return StateBefore(slots, originals, moved, first.base, first.written, first.num_originals)


def _unwritten(layer: StreamingLayer, stop: int) -> SlotState:
    """Return the content of the slots before `stop` that cannot be written from originals to the bit."""
    return read_slots(layer, layer.written, stop) if layer.written < stop else {}


def _rotated(layer: StreamingLayer, state: SlotState) -> SlotState:
    """Return the part of a state that depends on positions."""
    if layer.rotation.values is not None:
        return state
    return {name: tensor for name, tensor in state.items() if not name.startswith("value")}
