"""Inserts evicted tokens into the layers without a forward pass, and removes them again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from streamchat.cache.eviction.policy import Run
from streamchat.cache.layers.cuts import StateBefore, rewrite, save_cut
from streamchat.cache.layers.fronts import save_originals, write_fronts
from streamchat.cache.layers.layer import StreamingLayer
from streamchat.cache.layers.mover import Move
from streamchat.cache.layers.slots import (
    ORIGINAL,
    CopiedStates,
    open_front,
    originals_of,
    read_originals,
    set_originals,
)
from streamchat.cache.layers.storage import PARTS, Raw, head_dim, parts_of
from streamchat.cache.positions.rotation import TensorRotation

Originals = tuple[Tensor, Tensor]
"""Unrotated float32 keys and values ("originals"), (batch, num_kv_heads, tokens, head_dim) each."""


def unrotated(
    layers: Sequence[StreamingLayer], slots: CopiedStates, originals: CopiedStates, position: int, wanted: Run
) -> list[Originals]:
    """Return the originals of a run of tokens that were evicted together, per layer. The tensors are in main memory.

    Args:
        layers: The layers that the tokens were evicted from.
        slots: The content of the slots of all tokens of the eviction.
        originals: The originals of the leading tokens of the eviction, if these had been moved before.
        position: Absolute position of the first token of the eviction.
        wanted: The tokens to return, `[first, stop)`, counted from the first token of the eviction.
    """
    moves: list[Move] = []
    found: tuple[dict[int, Tensor], ...] = ({}, {})
    for part, name in enumerate(PARTS):
        rotations = [layer.rotation.values if part else layer.rotation.keys for layer in layers]
        for alike, raw in _groups(slots, name, rotations):
            known = originals.stack(f"{ORIGINAL}{name}s", alike) if originals else None
            whole, start = _begun(raw[""], known, wanted)
            found[part].update(zip(alike, whole.unbind(), strict=True))
            if start < wanted[1]:
                rest = {each: x.flatten(0, 1).narrow(2, start, wanted[1] - start) for each, x in raw.items()}
                missing = whole.flatten(0, 1)[:, :, start - wanted[0] :]
                moves.append(Move(rest, missing, rotations[alike[0]], position + start))
    if moves:
        layers[0].mover.read_slots(moves)
    return [(found[0][i], found[1][i]) for i in range(len(layers))]


def _groups(
    slots: CopiedStates, name: str, rotations: Sequence[TensorRotation | None]
) -> Iterator[tuple[list[int], Raw]]:
    """Yield groups of layers whose keys or values have the same shape and rotation, with parts (layers, batch, ...)."""
    names = {each for each, _, _ in slots.stacks if each.startswith(name)}
    for each, indices, _ in slots.stacks:
        if each == f"{name}s":
            groups: dict[TensorRotation | None, list[int]] = {}
            for i in indices:
                groups.setdefault(rotations[i], []).append(i)
            for alike in groups.values():
                yield alike, parts_of(name, {part: slots.stack(part, alike) for part in names})


def _begun(slots: Tensor, known: Tensor | None, wanted: Run) -> tuple[Tensor, int]:
    """Return a stack for the originals of `wanted`, filled with the known ones, and the first token that is missing."""
    first, stop = wanted
    stack = torch.empty(*slots.shape[:3], stop - first, head_dim(slots))
    if known is None or known.shape[3] <= first:
        return stack, first
    start = min(stop, known.shape[3])
    stack[:, :, :, : start - first] = known[:, :, :, first:start]
    return stack, start


def save_insert(layers: Sequence[StreamingLayer], at: int) -> StateBefore:
    """Save what an insertion at slot `at` overwrites: the content of the slots before `at`, which move."""
    return save_cut(layers, at, 0, at)


def insert_originals(layers: Sequence[StreamingLayer], at: int, originals: Sequence[Originals]) -> None:
    """Insert tokens before slot `at` of each layer. O(inserted tokens + tokens before `at`); later slots do not move.

    Args:
        layers: All layers. The position of their first slot must be at least the number of inserted tokens.
        at: The slot of the first inserted token.
        originals: The originals of the inserted tokens, per layer.
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
    """Undo the insertion of `count` slots at slot `at`.

    Args:
        layers: The layers after the insertion; their newest slots may have been removed since.
        before: The result of `save_insert`.
        at: The first inserted slot.
        count: The number of inserted slots.
        keep: Number of inserted slots that still exist. The others were removed together with newer slots.
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
