"""Evicts from all layers, and moves their first slots: layers of the same shape together, in few operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from streamchat.cache.layers.layer import StreamingLayer
from streamchat.cache.layers.storage import TensorStorage
from streamchat.cache.positions.rotation import TensorRotation

AT_ONCE = 1 << 20
"""Numbers that are moved at once, of several layers: 4 MB of float32."""


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
    pairs: list[list[Tensor]] = [[], []]
    for part, states in enumerate(pairs):
        found: dict[int, Tensor] = {}
        for places in _alike(layers, part, stop - first):
            rotation, stored = _rotation(layers[places[0]], part), [_storage(layers[i], part) for i in places]
            raws = [each.raw(layers[i].start + first, stop - first) for each, i in zip(stored, places, strict=True)]
            x = stored[0].decode({name: torch.stack([raw[name] for raw in raws]) for name in raws[0]}).float()
            if rotation is not None:
                angles = rotation.source.angles_range(layers[places[0]].base + first, stop - first, x.device)
                x = rotation.apply(x, angles, undo=True)
            found |= zip(places, x.unbind(), strict=True)
        states += [found[i] for i in range(len(layers))]
    return list(zip(*pairs, strict=True))


def write_fronts(layers: Sequence[StreamingLayer], prefix: int) -> None:
    """Write the first `prefix` slots of each layer from their originals, at the positions that they have now."""
    for part in range(2) if prefix and layers[0].num_originals else ():
        for places in _alike(layers, part, prefix):
            rotation, stored = _rotation(layers[places[0]], part), [_storage(layers[i], part) for i in places]
            x = torch.stack([layers[i].originals(part)[:, :, :prefix] for i in places])
            if rotation is not None:
                x = rotation.rotate_to(x, layers[places[0]].base)
            encoded = stored[0].encode(x)
            for name, tensor in encoded.items():
                slots = [
                    each.parts[name].narrow(2, layers[i].start, tensor.shape[3])
                    for each, i in zip(stored, places, strict=True)
                ]
                torch._foreach_copy_(slots, list(tensor.unbind()))
    for layer in layers:
        layer.written = prefix


def _storage(layer: StreamingLayer, part: int) -> TensorStorage:
    assert layer.storage is not None
    return layer.storage.both[part]


def _rotation(layer: StreamingLayer, part: int) -> TensorRotation | None:
    return layer.rotation.values if part else layer.rotation.keys


def _alike(layers: Sequence[StreamingLayer], part: int, count: int) -> Iterator[list[int]]:
    """Yield the numbers of layers whose keys (`part` 0) or values (1) have one shape and rotation.

    At most as many as have `AT_ONCE` numbers in `count` slots.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, layer in enumerate(layers):
        stored = _storage(layer, part)
        slot = stored.parts[""][:, :, 0]
        key = (_rotation(layer, part), stored.dtype, slot.device, slot.shape)
        groups.setdefault(key, []).append(i)
    for places in groups.values():
        size = _storage(layers[places[0]], part).parts[""][:, :, 0].numel()
        most = max(1, AT_ONCE // (size * max(1, count)))
        yield from (places[at : at + most] for at in range(0, len(places), most))
