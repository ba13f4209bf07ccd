"""How tiles store the weights of a quantized matrix. `kernels/source/tiles.h` describes the bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from streamchat.kernels.operations import (
    GROUP,
    HEADER,
    SCALE,
    SCALE_MIN,
    SUPER_16,
    SUPER_32,
    SUPERBLOCK,
    TILE,
    unit_size,
)

Kind = Literal["int8", "int4"]
LayoutName = Literal["int8", "int8_min", "int8_k", "int8_k16", "int4", "int4_k"]


@dataclass(frozen=True)
class Layout:
    """The codes of a tile, and their scales."""

    bits: int
    """Bits of a code: 4 (0 to 15) or 8 (-128 to 127)."""
    scales: int
    """Kind of the scales: SCALE, SCALE_MIN, SUPER_32 or SUPER_16."""

    @property
    def kind(self) -> Kind:
        """The precision, for users."""
        return "int4" if self.bits == 4 else "int8"

    @property
    def columns(self) -> int:
        """Columns of the repeating unit: a group, or a superblock."""
        return unit_size(self.bits, self.scales)[0]

    @property
    def unit_bytes(self) -> int:
        """Bytes of the repeating unit, for 16 rows."""
        return unit_size(self.bits, self.scales)[1]


LAYOUTS: dict[LayoutName, Layout] = {
    "int8": Layout(8, SCALE),
    "int8_min": Layout(8, SCALE_MIN),
    "int8_k": Layout(8, SUPER_32),
    "int8_k16": Layout(8, SUPER_16),
    "int4": Layout(4, SCALE_MIN),
    "int4_k": Layout(4, SUPER_32),
}


@dataclass(frozen=True)
class Coded:
    """Codes of some rows, and their scales."""

    codes: Tensor
    """(rows, columns / 32, 32) uint8 or int8."""
    scales: Sequence[Tensor]
    """Each (rows, columns / 32): two of uint8 or int8 with superblocks, else one or two of float16."""
    factors: Sequence[Tensor] = ()
    """With superblocks, two of (rows, columns / 256), float16: factors of the scales, and of the minimums or zeros."""


def tiles(layout: Layout, coded: Coded) -> Tensor:
    """Return (rows / 16 rounded up, units, bytes of a unit) uint8; missing rows are zero."""
    codes = _by_tile(coded.codes.view(torch.uint8))
    pack = _pack_4_bits if layout.bits == 4 else _pack_8_bits
    parts = [pack(codes), *(_plane(_by_tile(scale[..., None])) for scale in coded.scales)]
    blocks = torch.cat(parts, -1)
    if not coded.factors:
        return blocks
    headers = [_plane(_by_tile(factor[..., None])) for factor in coded.factors]
    count = blocks.shape[1] // SUPERBLOCK
    return torch.cat([*headers, blocks.reshape(len(blocks), count, -1)], -1)


def weights_of(layout: Layout, data: Tensor) -> Tensor:
    """(n, units, bytes of a unit) uint8 -> (n, 16, columns) float32: the weights of `n` tiles, on their device.

    Uses no kernels of our own, and reads nothing back from the device.
    """
    count = len(data)
    factors = None
    if layout.scales >= SUPER_32:
        head, data = torch.split(data, [HEADER, layout.unit_bytes - HEADER], -1)
        factors = _planes(head.contiguous().view(torch.float16)).float()[:, :, None]  # (n, superblocks, 1, 2, 16)
        data = data.reshape(count, factors.shape[1] * SUPERBLOCK, -1)
    codes = (_unpack_4_bits if layout.bits == 4 else _unpack_8_bits)(data[..., : 64 * layout.bits])
    rest = data[..., 64 * layout.bits :].contiguous()
    kinds = {SUPER_32: torch.uint8, SUPER_16: torch.int8}
    scales = _planes(rest.view(kinds.get(layout.scales, torch.float16))).float()
    if factors is not None:
        factors = factors[..., :1, :] if layout.scales == SUPER_16 else factors
        scales = (scales.view(count, -1, SUPERBLOCK, 2, TILE) * factors).view(scales.shape)
    scales = scales.permute(0, 3, 1, 2)  # (n, 16, groups, 1 or 2)
    if layout.scales == SUPER_16:
        return (codes.view(*scales.shape, -1) * scales[..., None]).view(count, TILE, -1)
    weights = codes * scales[..., :1]
    if layout.scales == SCALE_MIN:
        weights += scales[..., 1:]
    elif layout.scales == SUPER_32:
        weights -= scales[..., 1:]
    return weights.view(count, TILE, -1)


def _by_tile(rows: Tensor) -> Tensor:
    """(rows, ...) -> (tiles, 16, ...)."""
    missing = -len(rows) % TILE
    if missing:
        rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
    return rows.reshape(-1, TILE, *rows.shape[1:])


def _plane(part: Tensor) -> Tensor:
    """(tiles, 16, groups, 1) of any dtype -> (tiles, groups, bytes)."""
    return part.transpose(1, 2).contiguous().view(torch.uint8).reshape(len(part), part.shape[2], -1)


def _planes(data: Tensor) -> Tensor:
    """(tiles, groups, 16 or 32) -> (tiles, groups, 1 or 2, 16)."""
    return data.view(*data.shape[:2], -1, TILE)


def _pack_8_bits(codes: Tensor) -> Tensor:
    """(tiles, 16, groups, 32) uint8 -> (tiles, groups, 512)."""
    count, _, groups, _ = codes.shape
    return codes.view(count, TILE, groups, GROUP // 2, 2).permute(0, 2, 3, 1, 4).reshape(count, groups, -1)


def _unpack_8_bits(data: Tensor) -> Tensor:
    """Return (tiles, 16, groups, 32) int8 codes."""
    pairs = data.reshape(*data.shape[:2], GROUP // 2, TILE, 2).view(torch.int8)
    return pairs.permute(0, 3, 1, 2, 4).reshape(len(data), TILE, -1, GROUP)


def _pack_4_bits(codes: Tensor) -> Tensor:
    """(tiles, 16, groups, 32) uint8 -> (tiles, groups, 256)."""
    count, _, groups, _ = codes.shape
    # column 8 i + 4 b + 2 n + h: nibble n of byte 2 h + b of word i
    nibbles = codes.view(count, TILE, groups, 4, 2, 2, 2)
    data = nibbles[..., 0, :] | nibbles[..., 1, :] << 4
    return data.permute(0, 2, 3, 1, 5, 4).reshape(count, groups, -1)


def _unpack_4_bits(data: Tensor) -> Tensor:
    """Return (tiles, 16, groups, 32) uint8 codes."""
    words = data.reshape(*data.shape[:2], 4, TILE, 2, 2)
    nibbles = torch.stack([words & 15, words >> 4], -1)  # (tiles, groups, i, 16, h, b, n)
    return nibbles.permute(0, 3, 1, 2, 5, 6, 4).reshape(len(data), TILE, -1, GROUP)
