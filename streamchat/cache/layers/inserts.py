"""Inserts evicted tokens into the layers without a forward pass, and removes them again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streamchat.cache.layers.cuts import StateBefore, rewrite, save_cut
from streamchat.cache.layers.fronts import save_originals, write_fronts
from streamchat.cache.layers.layer import StreamingLayer
from streamchat.cache.layers.slots import (
    CopiedStates,
    open_front,
    originals_of,
    read_originals,
    set_originals,
    states_in,
)
from streamchat.cache.positions.rotation import TensorRotation

Originals = tuple[Tensor, Tensor]
"""Unrotated float32 keys and values, (batch, num_kv_heads, tokens, head_dim) each."""


def unrotated(
    layers: Sequence[StreamingLayer], slots: CopiedStates, originals: CopiedStates, position: int
) -> list[Originals]:
    """Return the originals of evicted tokens, per layer. The tensors are in main memory.

    Args:
        layers: The layers that they were evicted from.
        slots: The content of their slots.
        originals: The originals of the first tokens, if these had been moved before.
        position: Absolute position of the first one.
    """
    pairs: list[list[Tensor | None]] = [[None, None] for _ in layers]
    for name, indices, stack in states_in(slots):
        part = int(name == "values")
        for i, tensor in _undone(layers, part, indices, stack, position):
            pairs[i][part] = tensor
    result = []
    for i, (keys, values) in enumerate(pairs):
        assert keys is not None
        assert values is not None
        moved = originals.of(i)
        known = originals_of(moved) if moved else (keys[:, :, :0], values[:, :, :0])
        first = known[0].shape[2]
        result.append(
            (torch.cat([known[0], keys[:, :, first:]], dim=2), torch.cat([known[1], values[:, :, first:]], dim=2))
        )
    return result


def _undone(
    layers: Sequence[StreamingLayer], part: int, indices: tuple[int, ...], stack: Tensor, position: int
) -> list[tuple[int, Tensor]]:
    """Return (layer, unrotated tensor) for the layers of a stack; those that rotate alike are rotated back at once."""
    groups: dict[TensorRotation | None, list[int]] = {}
    for at, i in enumerate(indices):
        both = layers[i].rotation
        groups.setdefault(both.values if part else both.keys, []).append(at)
    found: list[tuple[int, Tensor]] = []
    for rotation, places in groups.items():
        tensors = (stack if len(places) == len(indices) else stack[places]).float()
        if rotation is not None:
            angles = rotation.source.angles_range(position, stack.shape[-2], stack.device)
            tensors = rotation.apply(tensors, angles, undo=True)
        found += [(indices[at], tensor) for at, tensor in zip(places, tensors.unbind(), strict=True)]
    return found


def save_insert(layers: Sequence[StreamingLayer], at: int) -> StateBefore:
    """Save what an insertion at slot `at` overwrites: the content of the slots before it, which move."""
    return save_cut(layers, at, 0, at)


def insert_originals(layers: Sequence[StreamingLayer], at: int, originals: Sequence[Originals]) -> None:
    """Insert tokens before slot `at` of each layer. O(inserted tokens and those before them); later slots do not move.

    Args:
        layers: All layers. The position of their first slot must be at least the number of tokens.
        at: The slot of the first token.
        originals: The tokens' originals, per layer.
    """
    count = originals[0][0].shape[2]
    assert all(count <= layer.base for layer in layers)
    save_originals(layers, at)
    for layer, (keys, values) in zip(layers, originals, strict=True):
        open_front(layer, count)
        states = [read_originals(layer, 0, at), read_originals(layer, at, max(at, layer.num_originals))]
        front, rest = ([originals_of(state)] if state else [] for state in states)
        set_originals(layer, [*front, (keys, values), *rest])
        layer.start -= count
        layer.base -= count
    write_fronts(layers, at + count)


def undo_insert(layers: Sequence[StreamingLayer], before: StateBefore, at: int, count: int, keep: int) -> None:
    """Remove `count` inserted slots from slot `at` on.

    Args:
        layers: The layers after the insertion; their newest slots may have been removed since.
        before: The result of `save_insert`.
        at: The first inserted slot.
        count: The number of inserted slots.
        keep: Number of inserted slots that still exist; the others were newer than a token that was removed since.
    """
    for layer in layers:
        if layer.storage is None:
            continue
        first = min(at, layer.length)
        states = [read_originals(layer, 0, min(first, before.known))]
        if before.known > first:
            states.append(read_originals(layer, first + keep, max(first + keep, before.known + count)))
        set_originals(layer, [originals_of(state) for state in states if state])
        layer.start += keep
        layer.base = before.base
        if not layer.length:
            layer.truncate(0)
    rewrite(layers, before, at)
