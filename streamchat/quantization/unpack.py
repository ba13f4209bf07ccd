"""Weights of tiles as numbers again: rows for an embedding, or a whole matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from streamchat.quantization.weights import CHUNK, GROUP, QuantizedWeight
from streamchat.kernels.operations import TILE


def columns_of(weight: QuantizedWeight) -> int:
    return weight.data.shape[1] * GROUP


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Return all weights, (rows, columns)."""
    columns = columns_of(weight)
    out = torch.empty(weight.data.shape[0] * TILE, columns, dtype=dtype)
    step = max(1, CHUNK // columns // TILE)
    for first in range(0, weight.data.shape[0], step):
        part = _tiles(weight.data[first : first + step], weight.kind)
        out[first * TILE : first * TILE + len(part) * TILE] = part.reshape(-1, columns)
    return out[: weight.rows]


def rows_at(weight: QuantizedWeight, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows `ids`, (n, columns)."""
    rows = _tiles(weight.data[ids // TILE], weight.kind)
    picked = rows[torch.arange(len(ids)), ids % TILE]
    return picked.to(dtype)


def _tiles(data: Tensor, kind: str) -> Tensor:
    """(n, columns / 32, bytes) uint8 -> (n, 16, columns) float32."""
    count, groups = data.shape[:2]
    if kind == "int8":
        pairs = data[..., : TILE * GROUP].contiguous().view(torch.int8).view(count, groups, GROUP // 2, TILE, 2)
        codes = pairs.permute(0, 3, 1, 2, 4).reshape(count, TILE, groups, GROUP).float()
        scale = data[..., TILE * GROUP :].contiguous().view(torch.float16).transpose(1, 2)[..., None]
        return (codes * scale.float()).reshape(count, TILE, -1)
    words = data[..., :256].contiguous().view(torch.uint16).to(torch.int32).view(count, groups, 4, TILE, 2)
    nibbles = (words[..., None] >> (4 * torch.arange(4, dtype=torch.int32))) & 15
    codes = nibbles.permute(0, 3, 1, 2, 5, 4).reshape(count, TILE, groups, GROUP).float()
    pairs = data[..., 256:].contiguous().view(torch.bfloat16).float().view(count, groups, TILE, 2).transpose(1, 2)
    return (pairs[..., :1] * (codes - 8) + pairs[..., 1:]).reshape(count, TILE, -1)
