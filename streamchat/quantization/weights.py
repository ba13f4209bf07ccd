"""int8 and int4 weight matrices, multiplied by compiled kernels if available, else by PyTorch's.

On a GPU, fused kernels decode with tiles; whatever else multiplies with them dequantizes a part after the other.

A decode step reads every weight once per token, so reading dominates its time: int8 has half the bytes of bfloat16,
int4 less than a third. For several hundred tokens at once, or without compiled kernels for more than a few, a product
with native weights is faster.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from streamchat.kernels.library import Kernels
from streamchat.kernels.operations import GROUP as GROUP
from streamchat.kernels.operations import TILE, Matrix, product, program
from streamchat.quantization import unpack
from streamchat.quantization.codes import INT8_LIMIT, centered_int4_codes, int4_codes, int8_codes
from streamchat.quantization.layouts import LAYOUTS, Coded, Layout, LayoutName, tiles
from streamchat.quantization.layouts import Kind as Kind

TILE_ROWS = 64
"""Rows of an int4 matrix that stay together in the layouts of all kernels, on any CPU."""

ON_A_GPU = 1 << 22
"""Weights that a GPU quantizes together; it takes about ten float32 copies of them."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix of `rows` x `columns` weights (out_features x in_features).

    In tiles, `w = scale * q` or `w = scale * q + minimum`, in groups of 32 or 16 along a row. For PyTorch's kernels,
    int8 has one group per row, and int4 is `w = scale * (q - 8) + zero` in groups of 32.
    """

    layout: LayoutName
    """How tiles store the weights; for PyTorch's kernels, int8 or int4."""
    data: Tensor
    """Tiles: (rows / 16 rounded up, units, bytes of a unit) uint8 including the scales. For PyTorch's kernels, int8:
    (rows rounded up to 16, columns) int8; int4: (rows, columns / 2) uint8, in a layout for this CPU."""
    scales: Tensor
    """int8: (rows rounded up to 16,). int4: (columns / 32, rows, 2), scale and zero. bfloat16. Empty for tiles."""
    rows: int
    """Output features."""
    kernels: Kernels | None = field(repr=False, compare=False)
    """The compiled kernels that multiply. None for PyTorch's, which get dequantized tiles."""

    @property
    def tiled(self) -> bool:
        """Whether the data is tiles."""
        return self.data.dim() == 3

    @property
    def is_dequantized(self) -> bool:
        """Whether every product dequantizes it: tiles without compiled kernels, as on a GPU."""
        return self.tiled and self.kernels is None

    @property
    def tile_layout(self) -> Layout:
        """Bits and scales of tiles."""
        return LAYOUTS[self.layout]

    @property
    def kind(self) -> Kind:
        """The precision, for users."""
        return self.tile_layout.kind

    @property
    def columns(self) -> int:
        """Input features."""
        if self.tiled:
            return self.data.shape[1] * self.tile_layout.columns
        return self.data.shape[1] * (2 if self.layout == "int4" else 1)

    @property
    def described(self) -> str:
        """The layout and whether it is tiles, which determine the numbers."""
        return f"{self.layout} in tiles" if self.tiled else self.layout

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.data.nbytes + self.scales.nbytes

    def matrix(self, bias: int | None = None) -> Matrix:
        """Return tiles as an operand of the kernels, with the address of a (rows,) float32 bias. Keep `data` alive."""
        return Matrix(self.data.data_ptr(), bias, self.rows, self.tile_layout.bits, self.tile_layout.scales)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the (rows, columns) weights of tiles, without a float32 copy of all of them."""
        return unpack.dequantize(self.tile_layout, self.data, self.rows, self.columns, dtype, self.kernels)

    def rows_at(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """(n,) ids -> (n, columns): rows of tiles.

        Raises:
            IndexError: An id is out of range; on a GPU, the device reports it later.
        """
        if not len(ids):
            return torch.empty(0, self.columns, dtype=dtype, device=self.data.device)
        is_on_cpu = self.data.device.type == "cpu"  # elsewhere, reading ids would wait for the device
        if is_on_cpu and not 0 <= int(ids.min()) <= int(ids.max()) < self.rows:
            raise IndexError(f"rows {int(ids.min())} to {int(ids.max())} of a matrix that has {self.rows}")
        return unpack.rows_at(self.tile_layout, self.data, ids, self.columns, dtype, self.kernels)

    def multiply(self, x: Tensor) -> Tensor:
        """(n, columns) -> (n, rows), in the dtype of `x`; PyTorch's kernels for codes round `x` to bfloat16.

        Raises:
            ValueError: `x` has another number of columns; the kernels would read after its end.
        """
        if x.shape[-1] != self.columns:
            raise ValueError(f"inputs of {x.shape[-1]} columns cannot be multiplied by weights of {self.columns}")
        if self.kernels is not None:
            return self._multiply_compiled(self.kernels, x)
        if self.tiled:
            return self._multiply_dequantized(x)
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
        operation = product(
            self.matrix(), x=x_floats.data_ptr(), out=out.data_ptr(), columns=columns, out_stride=self.rows, count=count
        )
        compiled.run(program([operation]), torch.get_num_threads())
        return out.to(x.dtype)

    def _multiply_dequantized(self, x: Tensor) -> Tensor:
        """Multiply by some rows after the other, so that there is no dequantized copy of a large matrix."""
        parts = unpack.chunks(self.tile_layout, self.data, self.rows, self.columns, x.dtype)
        products = [torch.nn.functional.linear(x, part) for part in parts]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)

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
            scales = self.scales[first:last] if self.layout == "int8" else self.scales[:, first:stop].contiguous()
        return QuantizedWeight(self.layout, data, scales, stop - first, self.kernels)


def rows_together(kind: Kind) -> int:
    """Return how many rows of a matrix stay together in the layouts of all kernels."""
    return TILE if kind == "int8" else TILE_ROWS


def can_quantize(kind: Kind, rows: int, columns: int) -> bool:
    """Return whether the kernels support a matrix of this size (for others, int8 would read out of bounds)."""
    return columns % GROUP == 0 and (kind == "int8" or rows % TILE == 0)


def quantize(weight: Tensor, kind: Kind, kernels: Kernels | None, *, tiled: bool = False) -> QuantizedWeight:
    """Quantize a (rows, columns) matrix of any float dtype, for these kernels (None: PyTorch's).

    Tiles are made on the device of the matrix, a part after the other; PyTorch's kernels are for a CPU.

    int4 recovers the codes of a matrix that was quantized in such groups before (GGUF's Q4_1 and Q4_K), even after
    rounding to bfloat16; in tiles, int8 those of Q8_0, Q5_0 and Q4_0.

    Args:
        weight: The weights.
        kind: The precision.
        kernels: The compiled kernels that will multiply; None for PyTorch's.
        tiled: Make tiles without kernels, too.

    Raises:
        ValueError: `can_quantize` does not allow this size.
    """
    rows, columns = weight.shape
    if not can_quantize(kind, rows, columns):
        raise ValueError(f"a matrix of {rows} x {columns} cannot be quantized to {kind}")
    if kernels is not None or tiled:
        at_once = unpack.WEIGHTS_TOGETHER if weight.device.type == "cpu" else ON_A_GPU
        chunks = torch.split(weight, unpack.rows_together(columns, at_once))
        made = torch.cat([_tiles(chunk.float(), kind) for chunk in chunks])
        return QuantizedWeight(kind, made, weight.new_empty(0, dtype=torch.bfloat16), rows, kernels)
    weight = weight.float().contiguous()
    if kind == "int8":
        return _int8_rows(weight)
    codes, scales = centered_int4_codes(weight)
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
    if kind == "int8":
        codes, scales = int8_codes(weight)
        return tiles(LAYOUTS[kind], Coded(codes, [scales]))
    codes, pairs = int4_codes(weight)
    return tiles(LAYOUTS[kind], Coded(codes.to(torch.uint8), pairs.unbind(-1)))
