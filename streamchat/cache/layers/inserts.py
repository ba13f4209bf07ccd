"""Inserts evicted tokens into the layers without a forward pass, and removes them again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streamchat.cache.eviction.policy import Run
from streamchat.cache.layers.cuts import StateBefore, rewrite, save_cut
from streamchat.cache.layers.fronts import save_originals, write_fronts
from streamchat.cache.layers.layer import StreamingLayer
from streamchat.cache.layers.mover import Move
from streamchat.cache.layers.slots import (
    CopiedStates,
    open_front,
    originals_of,
    read_originals,
    set_originals,
)
from streamchat.cache.layers.storage import PARTS, head_dim, parts_of

Originals = tuple[Tensor, Tensor]
"""Unrotated float32 keys and values, (batch, num_kv_heads, tokens, head_dim) each."""


def unrotated(
    layers: Sequence[StreamingLayer], slots: CopiedStates, originals: CopiedStates, position: int, wanted: Run
) -> list[Originals]:
    """Return the originals of some evicted tokens, per layer. The tensors are in main memory.

    Args:
        layers: The layers that they were evicted from.
        slots: The content of the slots of all tokens that were evicted with them.
        originals: The originals of the first of these, if they had been moved before.
        position: Absolute position of the first of these.
        wanted: First and last + 1 of those to return, counted from the first one.
    """
    first, stop = wanted
    moves: list[Move] = []
    result: list[Originals] = []
    for i, layer in enumerate(layers):
        state, known = slots.of(i), originals_of(originals.of(i)) if originals else None
        pair = []
        for part, name in enumerate(PARTS):
            raw = parts_of(name, state)
            batch, heads, _, _ = raw[""].shape
            whole = torch.empty(batch, heads, stop - first, head_dim(raw[""]))
            start = first
            if known is not None and known[part].shape[2] > first:
                start = min(stop, known[part].shape[2])
                whole[:, :, : start - first] = known[part][:, :, first:start]
            if start < stop:
                rest = {name: tensor.narrow(2, start, stop - start) for name, tensor in raw.items()}
                rotation = layer.rotation.values if part else layer.rotation.keys
                moves.append(Move(rest, whole[:, :, start - first :], rotation, position + start))
            pair.append(whole)
        result.append((pair[0], pair[1]))
    if moves:
        layers[0].mover.read_slots(moves)
    return result


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
            states.append(read_originals(layer, first + keep, before.known + count))
        set_originals(layer, [originals_of(state) for state in states if state])
        layer.start += keep
        layer.base = before.base
        if not layer.length:
            layer.truncate(0)
    rewrite(layers, before, at)
