"""One safetensors file with the weights of a model: tiles of quantized matrices, and other tensors as they are.

It is mapped into memory, so tensors start at multiples of 64 bytes. It is written tensor by tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from streamchat.kernels.operations import TILE
from streamchat.models.folder import LAYERS_ENTRY
from streamchat.quantization.layouts import LAYOUTS

ALIGNMENT = 64
"""Bytes: the size of a cache line."""
ENTRY_BYTES = 512
"""Room in the header for one tensor."""
DTYPES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
"""dtype -> its name in a safetensors file."""


@dataclass(frozen=True)
class StoredMatrix:
    """A quantized matrix of the file."""

    layout: str
    rows: int
    columns: int
    transposed: bool = False
    """Whether the layer stores its weight as (columns, rows)."""

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight."""
        return (self.columns, self.rows) if self.transposed else (self.rows, self.columns)


class TileWriter:
    """Writes the file; a context manager. Tensors whose size is not a multiple of 64 bytes are written last.

    Args:
        path: The new file.
        tensors: Maximum number of tensors.
    """

    def __init__(self, path: Path, tensors: int) -> None:
        self._room = -(-(tensors + 4) * ENTRY_BYTES // ALIGNMENT) * ALIGNMENT - 8
        self._file: BinaryIO = path.open("wb")
        self._file.seek(8 + self._room)
        self._at = 0
        self._header: dict[str, Any] = {}
        self._layers: dict[str, dict[str, Any]] = {}
        self._later: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor, coded: StoredMatrix | None = None) -> None:
        """Append a tensor; `coded` describes it if it is tiles."""
        if coded is not None:
            self._layers[name] = asdict(coded)
        if tensor.nbytes % ALIGNMENT:
            self._later[name] = tensor
        else:
            self._write(name, tensor)

    def __enter__(self) -> TileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                self._finish()

    def _write(self, name: str, tensor: Tensor) -> None:
        data = tensor.detach().contiguous()
        stop = self._at + data.nbytes
        about = {"dtype": DTYPES[data.dtype], "shape": list(data.shape), "data_offsets": [self._at, stop]}
        self._header[name] = about
        self._file.write(data.reshape(-1).view(torch.uint8).numpy().data)
        self._at = stop

    def _finish(self) -> None:
        for name, tensor in self._later.items():
            self._write(name, tensor)
        about = {"__metadata__": {LAYERS_ENTRY: json.dumps(self._layers, separators=(",", ":"))}}
        header = json.dumps(about | self._header, separators=(",", ":")).encode()
        assert len(header) <= self._room
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))


def read_tiles(path: Path) -> tuple[dict[str, Tensor], dict[str, StoredMatrix]]:
    """Return all tensors of the file, mapped into memory, and the descriptions of those that are tiles.

    Raises:
        OSError, ValueError, KeyError, TypeError, SafetensorError: The file is damaged.
    """
    with safe_open(path, framework="pt") as file:
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        coded = described(file.metadata())
    for name, each in coded.items():
        _check(name, tensors[name], each)
    return tensors, coded


def _check(name: str, tiles: Tensor, coded: StoredMatrix) -> None:
    """Refuse tiles of another size than described: the kernels would read after their end."""
    layout = {str(each): layout for each, layout in LAYOUTS.items()}[coded.layout]
    shape = (-(-coded.rows // TILE), coded.columns // layout.columns, layout.unit_bytes)
    if coded.columns % layout.columns or tuple(tiles.shape) != shape or tiles.dtype != torch.uint8:
        raise ValueError(
            f"{name} has tiles of {tuple(tiles.shape)} in {tiles.dtype}, which are not {coded.rows} x {coded.columns} "
            f"weights in {coded.layout}"
        )


def described(metadata: Mapping[str, str]) -> dict[str, StoredMatrix]:
    """Return the quantized matrices that the header of a file describes."""
    return {name: StoredMatrix(**each) for name, each in json.loads(metadata[LAYERS_ENTRY]).items()}
