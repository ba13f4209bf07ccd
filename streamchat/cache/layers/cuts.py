"""What an eviction takes from a layer and moves in it, saved so that it can be undone to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamchat.cache.layers.layer import StreamingLayer
from streamchat.cache.layers.slots import (
    SlotState,
    copied,
    open_front,
    originals_count,
    originals_of,
    read_originals,
    read_slots,
    set_originals,
    write_slots,
)


@dataclass(frozen=True)
class LayerState:
    """What a change of one layer loses: contents of slots, and the bookkeeping before it. Tensors in main memory."""

    slots: SlotState
    """The slots that an eviction drops; {} for other changes."""
    originals: SlotState
    """The originals of those slots, as far as they have some."""
    moved: SlotState
    """The slots from `written` on that the change writes anew."""
    base: int
    """Absolute position of the first slot."""
    written: int
    known: int
    """Number of originals."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(x.nbytes for state in (self.slots, self.originals, self.moved) for x in state.values())


def save_cut(layers: Sequence[StreamingLayer], at: int, count: int, front: int) -> list[LayerState]:
    """Return what evicting slots from slot `at` on loses, per layer. O(saved slots).

    The slots before `at` move as well. Those that were written from their originals before can be written from them
    again, so only the others are saved.

    Args:
        layers: The layers before the eviction.
        at: The first slot to evict.
        count: How many of the evicted slots to save, from the first one on.
        front: How many of the slots before `at` to save.
    """
    slots = copied([read_slots(layer, at, at + count) if count else {} for layer in layers])
    originals = copied([read_originals(layer, at, at + count) if count else {} for layer in layers])
    moved = copied([_unwritten(layer, front) for layer in layers])
    return _states(layers, slots, originals, moved)


def save_rebase(layers: Sequence[StreamingLayer], front: int) -> list[LayerState]:
    """Return what a rebase loses in the first `front` slots: their keys, which are rotated in place. O(front)."""
    none: list[SlotState] = [{} for _ in layers]
    moved = copied([_rotated(layer, _unwritten(layer, front)) for layer in layers])
    return _states(layers, none, none, moved)


def undo_cut(layer: StreamingLayer, before: LayerState, at: int, count: int, keep: int) -> None:
    """Undo the eviction of `count` slots from slot `at` on. O(restored slots and those before them).

    Args:
        layer: In the state after it, or with newest slots removed since.
        before: The layer's state of `save_cut`.
        at: The first evicted slot.
        count: The number of evicted slots.
        keep: How many of them to restore. The others were newer than a token that was removed since.
    """
    if layer.buffers is None or layer.length + keep == 0:
        return
    at = min(at, layer.length)
    open_front(layer, keep)
    _put_back_originals(layer, before, at, count, keep)
    layer.start -= keep
    layer.base = before.base
    if keep:
        write_slots(layer, at, {name: tensor[:, :, :keep] for name, tensor in before.slots.items()})
    _rewrite(layer, before, at)
    layer._refresh_views()


def undo_rebase(layer: StreamingLayer, before: LayerState) -> None:
    """Undo a rebase; newest slots may have been removed since."""
    if layer.buffers is None or layer.length == 0:
        return
    layer.base = before.base
    _rewrite(layer, before, layer.length)


def _put_back_originals(layer: StreamingLayer, before: LayerState, at: int, count: int, keep: int) -> None:
    """Restore the originals of the slots that had some before the cut, and drop those that it made."""
    states = [read_originals(layer, 0, min(at, before.known))]
    if before.known > at and keep:
        states.append({name: tensor[:, :, :keep] for name, tensor in before.originals.items()})
        states.append(read_originals(layer, at, max(at, before.known - count)))
    set_originals(layer, [originals_of(state) for state in states if state])


def _rewrite(layer: StreamingLayer, before: LayerState, stop: int) -> None:
    """Write the first `stop` slots as they were at position `before.base`."""
    from_originals = min(before.written, stop, originals_count(layer))
    if from_originals:
        layer._write_prefix(from_originals)
    layer.written = min(before.written, layer.length)
    left = stop - before.written
    if left > 0 and before.moved:
        write_slots(layer, before.written, {name: tensor[:, :, :left] for name, tensor in before.moved.items()})


def _states(
    layers: Sequence[StreamingLayer], slots: list[SlotState], originals: list[SlotState], moved: list[SlotState]
) -> list[LayerState]:
    return [
        LayerState(slots[i], originals[i], moved[i], layer.base, layer.written, originals_count(layer))
        for i, layer in enumerate(layers)
    ]


def _unwritten(layer: StreamingLayer, stop: int) -> SlotState:
    """Return what the slots before `stop` store that cannot be written from originals to the bit."""
    return read_slots(layer, layer.written, stop) if layer.written < stop else {}


def _rotated(layer: StreamingLayer, state: SlotState) -> SlotState:
    """Return the part of a state that a change of positions changes."""
    if layer.rotation.values is not None:
        return state
    return {name: tensor for name, tensor in state.items() if not name.startswith("value")}
