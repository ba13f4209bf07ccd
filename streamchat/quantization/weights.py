"""int8 and int4 weight matrices, multiplied by compiled kernels if available, else by PyTorch's.

A decode step reads every weight once per token, so reading dominates its time: int8 has half the bytes of bfloat16,
int4 less than a third. For several hundred tokens at once, or without compiled kernels for more than a few, a product
with native weights is faster.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from streamchat.kernels.library import Kernels
from streamchat.kernels.operations import GROUP as GROUP
from streamchat.kernels.operations import TILE, Matrix, product, program
from streamchat.quantization.codes import INT8_LIMIT, int4_codes, int8_codes

Kind = Literal["int8", "int4"]

BITS: dict[Kind, int] = {"int8": 8, "int4": 4}
TILE_ROWS = 64
"""Rows of an int4 matrix that stay together in the layouts of all kernels, on any CPU."""
CHUNK = 1 << 20
"""Weights that are quantized together; their float32 copies fit the caches."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix of `rows` x `columns` weights (out_features x in_features).

    int8: `w = scale * q` in groups of 32 along a row; for PyTorch's kernels, one group per row.
    int4: `w = scale * (q - 8) + zero` in groups of 32 along a row.
    """

    kind: Kind
    data: Tensor
    """Tiled for the compiled kernels: (rows / 16 rounded up, columns / 32, 544 or 320) uint8 including the scales.
    For PyTorch's, int8: (rows rounded up to 16, columns) int8; int4: (rows, columns / 2) uint8, in a layout for this
    CPU."""
    scales: Tensor
    """int8: (rows rounded up to 16,). int4: (columns / 32, rows, 2), scale and zero. bfloat16. Empty if tiled."""
    rows: int
    """Output features."""
    kernels: Kernels | None = field(repr=False, compare=False)
    """The compiled kernels that multiply; None for PyTorch's. Tiled weights need them."""

    @property
    def tiled(self) -> bool:
        """Whether the data has the layout of the compiled kernels."""
        return self.data.dim() == 3

    @property
    def columns(self) -> int:
        """Input features of tiled weights."""
        return self.data.shape[1] * GROUP

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return (rows, columns) weights, of tiled ones."""
        from streamchat.quantization.unpack import dequantize

        return dequantize(self, dtype)

    def rows_at(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """(n,) ids -> (n, columns): the rows `ids` of tiled weights."""
        from streamchat.quantization.unpack import rows_at

        return rows_at(self, ids, dtype)

    @property
    def layout(self) -> str:
        """Name of the layout: the kind, and whether int8 has groups."""
        return "int8 in groups" if self.kind == "int8" and self.tiled else self.kind

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.data.nbytes + self.scales.nbytes

    def multiply(self, x: Tensor) -> Tensor:
        """(n, columns) -> (n, rows), in the dtype of `x`; PyTorch's kernels round `x` to bfloat16."""
        if self.kernels is not None:
            return self._multiply_compiled(self.kernels, x)
        half = x if x.dtype == torch.bfloat16 else x.to(torch.bfloat16)
        if self.kind == "int8":
            product = torch._weight_int8pack_mm(half, self.data, self.scales)[:, : self.rows]
        else:
            product = torch._weight_int4pack_mm_for_cpu(half, self.data, GROUP, self.scales)
        return product if x.dtype == torch.bfloat16 else product.to(x.dtype)

    def _multiply_compiled(self, compiled: Kernels, x: Tensor) -> Tensor:
        count, columns = x.shape
        x_floats = x.detach().float().contiguous()
        out = torch.empty(count, self.rows)
        matrix = Matrix(self.data.data_ptr(), rows=self.rows, bits=BITS[self.kind])
        operation = product(
            matrix, x=x_floats.data_ptr(), out=out.data_ptr(), columns=columns, out_stride=self.rows, count=count
        )
        compiled.run(program([operation]), torch.get_num_threads())
        return out.to(x.dtype)

    def part(self, first: int, stop: int) -> QuantizedWeight:
        """Return rows `[first, stop)`, as views if the kernels accept them.

        `first` must be a multiple of `rows_together`, and `stop` too unless it is the end.
        """
        unit = rows_together(self.kind)
        assert first % unit == 0
        assert stop % unit == 0 or stop == self.rows
        if self.tiled:
            data, scales = self.data[first // TILE : -(-stop // TILE)], self.scales
        else:
            last = -(-stop // TILE) * TILE
            data = self.data[first:last]
            scales = self.scales[first:last] if self.kind == "int8" else self.scales[:, first:stop].contiguous()
        return QuantizedWeight(self.kind, data, scales, stop - first, self.kernels)


def rows_together(kind: Kind) -> int:
    """Return how many rows of a matrix stay together in the layouts of all kernels."""
    return TILE if kind == "int8" else TILE_ROWS


def can_quantize(kind: Kind, rows: int, columns: int) -> bool:
    """Return whether the kernels support a matrix of this size (for others, int8 would read out of bounds)."""
    return columns % GROUP == 0 and (kind == "int8" or rows % TILE == 0)


def quantize(weight: Tensor, kind: Kind, kernels: Kernels | None, *, tiled: bool = False) -> QuantizedWeight:
    """Quantize a (rows, columns) matrix of any float dtype on the CPU, for these kernels (None: PyTorch's).

    int4 recovers the codes of a matrix that was quantized in such groups before (GGUF's Q4_1 and Q4_K), even after
    rounding to bfloat16; for the compiled kernels, int8 those of Q8_0, Q5_0 and Q4_0.

    Raises:
        ValueError: `can_quantize` does not allow this size.
    """
    rows, columns = weight.shape
    if not can_quantize(kind, rows, columns):
        raise ValueError(f"a matrix of {rows} x {columns} cannot be quantized to {kind}")
    if kernels is not None or tiled:
        chunks = torch.split(weight, max(1, CHUNK // columns // TILE) * TILE)
        tiles = torch.cat([_tiles(chunk.float(), kind) for chunk in chunks])
        return QuantizedWeight(kind, tiles, torch.empty(0, dtype=torch.bfloat16), rows, kernels)
    weight = weight.float().contiguous()
    if kind == "int8":
        return _int8_rows(weight)
    codes, scales = int4_codes(weight)
    data = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.view(rows, columns), 1)
    return QuantizedWeight("int4", data, scales.transpose(0, 1).contiguous(), rows, None)


def _int8_rows(weight: Tensor) -> QuantizedWeight:
    rows = weight.shape[0]
    weight = torch.nn.functional.pad(weight, (0, 0, 0, -rows % TILE))  # with other sizes, PyTorch reads out of bounds
    scales = (weight.abs().amax(1) / INT8_LIMIT).clamp_min(torch.finfo(torch.float32).tiny).to(torch.bfloat16)
    # clamp: if the scale was rounded down, the largest weight exceeds 127 scales
    codes = (weight / scales.float()[:, None]).round_().clamp_(-INT8_LIMIT, INT8_LIMIT)
    return QuantizedWeight("int8", codes.to(torch.int8), scales, rows, None)


def _tiles(weight: Tensor, kind: Kind) -> Tensor:
    """Return (rows, columns) float32 weights as tiles."""
    return _int8_tiles(*int8_codes(weight)) if kind == "int8" else _int4_tiles(*int4_codes(weight))


def _int8_tiles(codes: Tensor, scales: Tensor) -> Tensor:
    """(rows / 16 rounded up, columns / 32, 544) uint8; kernels/source/tiles.h describes the layout."""
    rows, count = scales.shape
    missing = -rows % TILE
    codes = torch.nn.functional.pad(codes, (0, 0, 0, 0, 0, missing)).view(-1, TILE, count, GROUP // 2, 2)
    scales = torch.nn.functional.pad(scales, (0, 0, 0, missing)).view(-1, TILE, count).transpose(1, 2)
    pairs = codes.permute(0, 2, 3, 1, 4).reshape(-1, count, TILE * GROUP)
    return torch.cat([pairs.view(torch.uint8), scales.contiguous().view(torch.uint8)], dim=-1)


def _int4_tiles(codes: Tensor, scales: Tensor) -> Tensor:
    """(rows / 16, columns / 32, 320) uint8; kernels/source/tiles.h describes the layout."""
    rows, count = codes.shape[:2]
    # (tile, row, group, quarter, nibble, half): four nibbles make a 16-bit word, two words a row's share of a quarter
    nibbles = codes.view(rows // TILE, TILE, count, 4, 4, 2).permute(0, 2, 3, 1, 5, 4)
    words = (nibbles << (4 * torch.arange(4, dtype=torch.int32))).sum(-1, dtype=torch.int32)
    data = words.to(torch.uint16).reshape(rows // TILE, count, -1).view(torch.uint8)
    pairs = scales.view(rows // TILE, TILE, count, 2).transpose(1, 2).reshape(rows // TILE, count, -1)
    return torch.cat([data, pairs.view(torch.uint8)], dim=-1)
