"""Moves cached tokens to other positions with the compiled kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from streamchat.cache.layers.mover import TORCH, Move
from streamchat.kernels import operations
from streamchat.kernels.library import Kernels

FORMATS = {
    torch.bfloat16: operations.BFLOAT16,
    torch.float16: operations.FLOAT16,
    torch.float32: operations.FLOAT32,
    torch.int8: operations.INT8,
    torch.uint8: operations.INT4,
}


class CompiledMover:
    """See `streamchat.cache.layers.mover.Mover`. PyTorch moves what the kernels do not support.

    Args:
        kernels: The compiled kernels.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def write_slots(self, moves: Sequence[Move]) -> None:
        """Write the slots of each move from its originals."""
        TORCH.write_slots(_run(self._kernels.write_slots, moves))

    def read_slots(self, moves: Sequence[Move]) -> None:
        """Write the originals of each move from its slots."""
        TORCH.read_slots(_run(self._kernels.read_slots, moves))


def _run(function: Callable[[ctypes.Array[operations.Move], int], None], moves: Sequence[Move]) -> list[Move]:
    """Call the kernels for the moves that they support; return the others."""
    templates: dict[tuple[object, ...], _Template | None] = {}
    ours: list[operations.Move] = []
    others: list[Move] = []
    for move in moves:
        slots, scales, originals = move.slots[""], move.slots.get("scales"), move.originals
        rotation = move.rotation
        # most layers differ in nothing but addresses
        key = (
            None
            if rotation is None
            else (id(rotation.source), rotation.offset, rotation.interleaved, rotation.reverse),
            *(move.position, move.searches, slots.device, slots.dtype, slots.shape),
            *(slots.stride(), None if scales is None else scales.stride(), originals.stride()),
        )
        if key not in templates:
            templates[key] = _Template(move) if _is_supported(move) else None
        template = templates[key]
        if template is None:
            others.append(move)
        elif originals.numel():
            found = operations.Move.from_buffer_copy(template.members)
            found.originals, found.slots = originals.data_ptr(), slots.data_ptr()
            if scales is not None:
                found.scales = scales.data_ptr()
            ours.append(found)
    if ours:
        function((operations.Move * len(ours))(*ours), torch.get_num_threads())
    return others


def _is_supported(move: Move) -> bool:
    slots, originals = move.slots[""], move.originals
    return (
        slots.device.type == "cpu"
        and slots.dtype in FORMATS
        and originals.shape[-1] <= operations.MAX_HEAD_DIM
        and all(map(_is_plain, (*move.slots.values(), originals)))
    )


def _is_plain(x: Tensor) -> bool:
    """Return whether the numbers of each head are contiguous, and all heads equally far apart, also across rows."""
    token = 1 if x.dim() == 3 else x.shape[-1]
    has_rows = x.stride(-1) == 1 and x.stride(2) == token
    return has_rows and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1))


class _Template:
    """The structure of the kernels for a move, without addresses of slots and originals; keeps its angles alive."""

    def __init__(self, move: Move) -> None:
        slots, scales, originals, rotation = move.slots[""], move.slots.get("scales"), move.originals, move.rotation
        batch, heads, tokens, dim = originals.shape
        self.members = operations.Move(
            original_stride=originals.stride(1),
            head_stride_bytes=slots.stride(1) * slots.element_size(),
            scale_stride=0 if scales is None else scales.stride(1),
            heads=batch * heads,
            tokens=tokens,
            dim=dim,
            format=FORMATS[slots.dtype],
            searches=move.searches,
        )
        if rotation is not None and tokens:
            cos, sin = rotation.source.angles_range(move.position, tokens, slots.device)
            self._angles = cos.contiguous(), (-sin if rotation.reverse else sin).contiguous()
            self.members.cos, self.members.sin = (each.data_ptr() for each in self._angles)
            self.members.pairs, self.members.first_dim = cos.shape[-1], rotation.offset
            self.members.is_interleaved = rotation.interleaved
