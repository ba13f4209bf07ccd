"""Weights of a GGUF file for a model: tiles of quantized matrices, other tensors as numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from streamchat.models.tile_file import StoredMatrix
from streamchat.quantization.gguf_blocks import SERVED, tiles_of_gguf
from streamchat.quantization.linear import is_linear
from streamchat.quantization.weights import QuantizedWeight, can_quantize, quantize

PLAIN = ("F32", "F16", "BF16", "F64")
"""Types that are not quantized."""


@dataclass(frozen=True)
class Placed:
    """Where a tensor of the file goes."""

    name: str
    """The name of the parameter."""
    order: NDArray[np.int64] | None = None
    """Rows of the file in the order of the parameter; None for the same order."""
    transposed: bool = False
    """Whether the parameter is (columns, rows)."""


@dataclass
class GgufWeights:
    """Reads the weights of a GGUF file one by one.

    Args:
        tensors: Tensors of `gguf.GGUFReader`.
        model: The model, on the meta device.
        processor: Transforms tensors of this architecture from llama.cpp's order to transformers'.
        names: Name in the file -> name of the parameter.
    """

    tensors: list[Any]
    model: Any
    processor: Any
    names: Mapping[str, str]
    requantized: set[str] = field(default_factory=set)
    """Types that are not served, whose weights were quantized again to int8."""

    def has_tiles(self) -> bool:
        """Return whether the file has quantized matrices that stay quantized.

        They do not if there are quantized experts, whose tensors are merged.
        """
        quantized = [tensor for tensor in self.tensors if tensor.tensor_type.name not in PLAIN]
        return any(self._is_matrix(tensor) for tensor in quantized) and all(len(t.shape) < 3 for t in quantized)

    def need(self) -> tuple[int, int]:
        """Return the bytes of memory and of disk space that a conversion needs at most."""
        sizes = [int(tensor.n_elements) for tensor in self.tensors]
        if not self.has_tiles():
            return 4 * sum(sizes), 4 * sum(sizes)
        stored = [
            int(size * (1.25 if self._is_matrix(tensor) and tensor.tensor_type.name not in PLAIN else 4))
            for tensor, size in zip(self.tensors, sizes, strict=True)
        ]
        return 8 * max(sizes), sum(stored)

    def read(self, tensor: Any) -> Iterator[tuple[str, Tensor, StoredMatrix | None]]:
        """Yield the parameter that `tensor` becomes: its name, its tiles or numbers, and the description of tiles."""
        placed = self._place(tensor) if self._is_matrix(tensor) else None
        if placed is None:
            for name, weights in self.numbers(tensor).items():
                yield name, weights, None
            return
        kind = tensor.tensor_type
        if kind in SERVED:
            made = tiles_of_gguf(tensor.data, kind, placed.order, None)
        elif kind.name in PLAIN:
            yield placed.name, self.numbers(tensor)[placed.name], None
            return
        else:
            self.requantized.add(kind.name)
            weights = self.numbers(tensor)[placed.name]
            made = quantize_tiles(weights.T if placed.transposed else weights)
        yield placed.name, made.data, StoredMatrix(made.layout, made.rows, made.columns, placed.transposed)

    def numbers(self, tensor: Any) -> dict[str, Tensor]:
        """Return the parameters that `tensor` becomes, in float32 or the 16-bit dtype of the file."""
        found: dict[str, Tensor] = {}
        self.add_numbers(tensor, found)
        dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(tensor.tensor_type.name, torch.float32)
        return {name: weights.to(dtype) for name, weights in found.items()}

    def add_numbers(self, tensor: Any, found: dict[str, Tensor]) -> None:
        """Add the parameters that `tensor` becomes to `found`, in float32. Experts of several tensors are joined."""
        import gguf

        read = self._process(tensor, gguf.dequantize(tensor.data, tensor.tensor_type), found)
        if read.name in self.names:
            found[self.names[read.name]] = torch.from_numpy(read.weights.copy()).float()

    def _process(self, tensor: Any, weights: Any, found: dict[str, Any]) -> Any:
        # processors of mixture-of-experts models write into `tensors` directly and return no name
        return self.processor.process(
            weights=weights, name=tensor.name, tensor_key_mapping=self.names, parsed_parameters={"tensors": found}
        )

    def _is_matrix(self, tensor: Any) -> bool:
        """Return whether the layer of `tensor` can serve tiles: it is linear, or an embedding."""
        owner, _, part = self.names.get(tensor.name, "").rpartition(".")
        if not owner or part != "weight" or len(tensor.shape) != 2:
            return False
        columns, rows = (int(size) for size in tensor.shape)
        return is_served(self.model.get_submodule(owner)) and can_quantize("int8", rows, columns)

    def _place(self, tensor: Any) -> Placed | None:
        """Return where the rows of a matrix go; None if the processor does more than to reorder or transpose.

        The processor is tried on row numbers and on column numbers.
        """
        columns, rows = (int(size) for size in tensor.shape)
        row_numbers = np.broadcast_to(np.arange(rows, dtype=np.float32)[:, None], (rows, columns))
        column_numbers = np.broadcast_to(np.arange(columns, dtype=np.float32), (rows, columns))
        by_row, by_column = (self._process(tensor, each, {}) for each in (row_numbers, column_numbers))
        if by_row.name not in self.names or rows > 1 << 24:
            return None
        name = self.names[by_row.name]
        if by_row.weights is row_numbers and by_column.weights is column_numbers:
            return Placed(name)
        for transposed in (False, True):
            found = by_row.weights.T if transposed else by_row.weights
            found_columns = by_column.weights.T if transposed else by_column.weights
            if found.shape != (rows, columns) or not np.array_equal(found_columns, column_numbers):
                continue
            order = found[:, 0].astype(np.int64)
            if np.array_equal(found, np.broadcast_to(found[:, :1], found.shape)) and _is_permutation(order):
                same = np.array_equal(order, np.arange(rows))
                return Placed(name, None if same else order, transposed)
        return None


def is_served(module: nn.Module) -> bool:
    """Return whether `module` can hold tiles instead of a native weight: a linear layer, or an embedding."""
    return is_linear(module) or type(module) is Conv1D or isinstance(module, nn.Embedding)


def quantize_tiles(weights: Tensor) -> QuantizedWeight:
    """Return int8 tiles of (rows, columns) weights."""
    return quantize(weights, "int8", None, tiled=True)


def _is_permutation(order: NDArray[np.int64]) -> bool:
    return bool(np.array_equal(np.sort(order), np.arange(len(order))))
