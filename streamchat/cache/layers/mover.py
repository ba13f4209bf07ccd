"""Moves keys and values to other positions: from unrotated float32 copies to slots, and back.

A mover treats layers of the same shape together. What a head becomes must not depend on the others, to the bit: undo
writes slots in other numbers. All moves of a cache use the same mover, because two movers may round differently.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from streamchat.cache.layers.codes import dequantize, quantize
from streamchat.cache.layers.storage import Raw
from streamchat.cache.positions.rotation import TensorRotation

AT_ONCE = 1 << 20
"""Numbers that PyTorch moves at once, of several layers: 4 MB of float32."""
_ATTRIBUTE = "_streamchat_mover"


@dataclass(frozen=True)
class Move:
    """A range of slots of one layer's keys or values, and their originals."""

    slots: Raw
    """Parts of the slots, (batch, num_kv_heads, n, ...): numbers, or codes with `scales`."""
    originals: Tensor
    """Unrotated copies, (batch, num_kv_heads, n, head_dim) in float32."""
    rotation: TensorRotation | None
    """None if they carry no positions."""
    position: int
    """Absolute position of the first slot."""
    searches: bool = False
    """See `quantize`."""


class Mover(Protocol):
    """Writes one side of moves from the other one."""

    def write_slots(self, moves: Sequence[Move]) -> None:
        """Write the slots of each move from its originals."""

    def read_slots(self, moves: Sequence[Move]) -> None:
        """Write the originals of each move from its slots."""


class TorchMover:
    """Moves with PyTorch operations, on any device."""

    def write_slots(self, moves: Sequence[Move]) -> None:
        """See `Mover`."""
        for some in _alike(moves):
            first = some[0]
            x = torch.stack([move.originals for move in some])
            if first.rotation is not None:
                x = first.rotation.rotate_to(x, first.position)
            for name, part in _encoded(x, first).items():
                torch._foreach_copy_([move.slots[name] for move in some], list(part.unbind()))

    def read_slots(self, moves: Sequence[Move]) -> None:
        """See `Mover`."""
        for some in _alike(moves):
            first = some[0]
            parts = {name: torch.stack([move.slots[name] for move in some]) for name in first.slots}
            x = (dequantize(parts[""], parts["scales"]) if "scales" in parts else parts[""]).float()
            if first.rotation is not None:
                angles = first.rotation.source.angles_range(first.position, x.shape[-2], x.device)
                x = first.rotation.apply(x, angles, undo=True)
            torch._foreach_copy_([move.originals for move in some], list(x.unbind()))


TORCH = TorchMover()


def set_mover(model: Any, mover: Mover) -> None:
    """Use `mover` in new caches of `model`."""
    setattr(model, _ATTRIBUTE, mover)


def mover_of(model: Any) -> Mover:
    """Return the mover for caches of `model`."""
    mover: Mover = getattr(model, _ATTRIBUTE, TORCH)
    return mover


def _encoded(x: Tensor, move: Move) -> Raw:
    if "scales" not in move.slots:
        return {"": x}
    bits = 4 if move.slots[""].dtype == torch.uint8 else 8
    codes, scales = quantize(x, bits, searches=move.searches)
    return {"": codes, "scales": scales}


def _alike(moves: Sequence[Move]) -> Iterator[list[Move]]:
    """Yield groups of moves with the same shapes, positions, and rotation, of `AT_ONCE` numbers at most."""
    groups: dict[tuple[object, ...], list[Move]] = {}
    for move in moves:
        slots = move.slots[""]
        key = (move.rotation, move.position, move.searches, slots.dtype, slots.device, slots.shape)
        groups.setdefault(key, []).append(move)
    for group in groups.values():
        most = max(1, AT_ONCE // max(1, group[0].originals.numel()))
        yield from (group[at : at + most] for at in range(0, len(group), most))
