"""int8 and int4 weight matrices, multiplied by compiled kernels if available, else by PyTorch's.

A decode step reads every weight once per token, so reading dominates its time: int8 has half the bytes of bfloat16,
int4 less than a third. For many tokens at once the kernels are slower than a plain bfloat16 product.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from streamchat.kernels.library import Kernels
from streamchat.kernels.operations import GROUP as GROUP
from streamchat.kernels.operations import TILE, Matrix, product, program

Kind = Literal["int8", "int4"]

BITS: dict[Kind, int] = {"int8": 8, "int4": 4}
TILE_ROWS = 64
"""Rows of an int4 matrix that stay together in the layouts of all kernels, on any CPU."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix of `rows` x `columns` weights (out_features x in_features), with bfloat16 scales.

    int8: one scale per row, `w = scale * q`. int4: `w = scale * (q - 8) + zero` in groups of 32 along a row.
    """

    kind: Kind
    data: Tensor
    """int8: (rows, columns) int8. int4: (rows, columns / 2) uint8, in the layout of PyTorch's kernel for this CPU; or
    tiled, (rows / 16, columns / 32, 320) uint8 including the scales, in the layout of the compiled kernels."""
    scales: Tensor
    """int8: (rows,). int4: (columns / 32, rows, 2), scale and zero. bfloat16. Empty if tiled."""

    kernels: Kernels | None = field(repr=False, compare=False)
    """The compiled kernels that multiply; None for PyTorch's. Tiled weights need them."""

    @property
    def tiled(self) -> bool:
        """Whether the data has the layout of the compiled kernels."""
        return self.data.dim() == 3

    @property
    def rows(self) -> int:
        """Output features."""
        return self.data.shape[0] * (TILE if self.tiled else 1)

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
            product = torch._weight_int8pack_mm(half, self.data, self.scales)
        else:
            product = torch._weight_int4pack_mm_for_cpu(half, self.data, GROUP, self.scales)
        return product if x.dtype == torch.bfloat16 else product.to(x.dtype)

    def _multiply_compiled(self, compiled: Kernels, x: Tensor) -> Tensor:
        count, columns = x.shape
        x_floats = x.detach().float().contiguous()
        out = torch.empty(count, self.rows)
        matrix = Matrix(self.data.data_ptr(), self.scales.data_ptr(), rows=self.rows, bits=BITS[self.kind])
        operation = product(
            matrix, x=x_floats.data_ptr(), out=out.data_ptr(), columns=columns, out_stride=self.rows, count=count
        )
        compiled.run(program([operation]), torch.get_num_threads())
        return out.to(x.dtype)

    def part(self, first: int, stop: int) -> QuantizedWeight:
        """Return rows `[first, stop)`, as views if the kernels accept them.

        For int4, `first` must be a multiple of `TILE_ROWS`, and `stop` too unless it is the end.
        """
        if self.kind == "int8":
            return QuantizedWeight("int8", self.data[first:stop], self.scales[first:stop], self.kernels)
        if self.tiled:
            return QuantizedWeight("int4", self.data[first // TILE : stop // TILE], self.scales, self.kernels)
        assert first % TILE_ROWS == 0
        assert stop % TILE_ROWS == 0 or stop == self.rows
        scales = self.scales[:, first:stop].contiguous()
        return QuantizedWeight("int4", self.data[first:stop], scales, self.kernels)


def can_quantize(kind: Kind, rows: int, columns: int) -> bool:
    """Return whether the kernels support a matrix of this size (for others, int8 would read out of bounds)."""
    return columns % GROUP == 0 and (kind == "int8" or rows % TILE == 0)


def quantize(weight: Tensor, kind: Kind, kernels: Kernels | None) -> QuantizedWeight:
    """Quantize a (rows, columns) matrix of any float dtype on the CPU, for these kernels (None: PyTorch's).

    int4 recovers the codes of a matrix that was quantized in such groups before (GGUF's Q4_1) exactly, even after
    rounding to bfloat16: the smallest and largest weight of a group have codes 0 and 15.

    Raises:
        ValueError: `can_quantize` does not allow this size.
    """
    rows, columns = weight.shape
    if not can_quantize(kind, rows, columns):
        raise ValueError(f"a matrix of {rows} x {columns} cannot be quantized to {kind}")
    weight = weight.float().contiguous()
    return _int8(weight, kernels) if kind == "int8" else _int4(weight, kernels)


def _int8(weight: Tensor, kernels: Kernels | None) -> QuantizedWeight:
    scales = (weight.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny).to(torch.bfloat16)
    # clamp: if the scale was rounded down, the largest weight exceeds 127 scales
    codes = (weight / scales.float()[:, None]).round_().clamp_(-127, 127)
    return QuantizedWeight("int8", codes.to(torch.int8), scales, kernels)


def _int4(weight: Tensor, kernels: Kernels | None) -> QuantizedWeight:
    rows, columns = weight.shape
    codes, scales = int4_codes(weight)
    if kernels is not None:
        return QuantizedWeight("int4", _tiles(codes, scales), torch.empty(0, dtype=torch.bfloat16), kernels)
    data = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.view(rows, columns), 1)
    return QuantizedWeight("int4", data, scales.transpose(0, 1).contiguous(), kernels)


def _tiles(codes: Tensor, scales: Tensor) -> Tensor:
    """(rows / 16, columns / 32, 320) uint8 for the compiled kernels; kernels/source/tiles.h describes the layout."""
    rows, count = codes.shape[:2]
    # (tile, row, group, quarter, nibble, half): four nibbles make a 16-bit word, two words a row's share of a quarter
    nibbles = codes.view(rows // TILE, TILE, count, 4, 4, 2).permute(0, 2, 3, 1, 5, 4)
    words = (nibbles << (4 * torch.arange(4, dtype=torch.int32))).sum(-1, dtype=torch.int32)
    data = words.to(torch.uint16).reshape(rows // TILE, count, -1).view(torch.uint8)
    pairs = scales.view(rows // TILE, TILE, count, 2).transpose(1, 2).reshape(rows // TILE, count, -1)
    return torch.cat([data, pairs.view(torch.uint8)], dim=-1)


def int4_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (rows, columns / 32, 32) int32 from 0 to 15, and (rows, columns / 32, 2) bfloat16 scales and zeros.

    Scale and zero of a group are the least-squares fit to its codes.
    """
    groups = weight.view(weight.shape[0], -1, GROUP)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    step = ((high - low) / 15).clamp_min(torch.finfo(torch.float32).tiny)
    codes = ((groups - low) / step).round_().clamp_(0, 15)
    centered = codes - codes.mean(-1, keepdim=True)
    mean = groups.mean(-1, keepdim=True)
    variance = centered.square().sum(-1, keepdim=True)
    scale = torch.where(variance > 0, (centered * (groups - mean)).sum(-1, keepdim=True) / variance, step)
    scale = scale.to(torch.bfloat16).float()
    zero = mean - scale * (codes.mean(-1, keepdim=True) - 8)
    return codes.to(torch.int32), torch.cat([scale, zero], dim=-1).to(torch.bfloat16)
