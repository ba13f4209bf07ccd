"""Evicts from all layers, and moves their first slots, which are written from unrotated copies."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from streamchat.cache.layers.layer import StreamingLayer


def evict_slots(layers: Sequence[StreamingLayer], prefix: int, count: int) -> None:
    """Evict `count` tokens after the first `prefix` from each layer. O(prefix): the window is not touched."""
    filled = [layer for layer in layers if layer.is_initialized]
    if not filled or count == 0:
        return
    save_originals(filled, prefix)
    for layer in filled:
        layer.drop_slots(prefix, count)
    write_fronts(filled, prefix)


def rebase(layers: Sequence[StreamingLayer], to: int = 0) -> None:
    """Move all positions so that they start at `to`. O(length), needed once per thousands of tokens."""
    moved = [layer for layer in layers if layer.is_initialized and layer.base != to]
    for layer in moved:
        layer.move_window(to)
    if moved:
        write_fronts(moved, moved[0].num_originals)


def save_originals(layers: Sequence[StreamingLayer], prefix: int) -> None:
    """Save unrotated float32 copies of the first `prefix` tokens, before they are moved for the first time."""
    known = layers[0].num_originals
    if prefix <= known:
        return
    for fresh, layer in zip(read_unrotated(layers, known, prefix), layers, strict=True):
        layer.add_originals(*fresh)


def read_unrotated(layers: Sequence[StreamingLayer], first: int, stop: int) -> list[tuple[Tensor, Tensor]]:
    """Return the keys and values of slots `[first, stop)` of each layer in float32, without rotary positions."""
    moves = [layer.move(part, first, layer.new_originals(part, stop - first)) for layer in layers for part in range(2)]
    layers[0].mover.read_slots(moves)
    return [(keys.originals, values.originals) for keys, values in zip(moves[::2], moves[1::2], strict=True)]


def write_fronts(layers: Sequence[StreamingLayer], prefix: int) -> None:
    """Write the first `prefix` slots of each layer from their originals, at the positions that they have now."""
    if prefix and layers[0].num_originals:
        moves = [layer.move(part, 0, layer.originals(part)[:, :, :prefix]) for layer in layers for part in range(2)]
        layers[0].mover.write_slots(moves)
    for layer in layers:
        layer.written = prefix
