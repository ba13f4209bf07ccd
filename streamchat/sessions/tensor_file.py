"""Writes tensors in the safetensors format, into the file that is given or as bytes.

`safetensors.torch.save_file` (0.8) writes into another file of its own next to it; a process that ends meanwhile leaves
that file behind, under a name that nothing looks for. And `safetensors.torch.save` (0.8) creates a ctypes type for each
number of bytes that a tensor can have, which Python never frees.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamchat.models.tile_file import DTYPES

_ALIGNMENT = 8
"""Bytes. The data starts at a multiple of the size of the largest element, and larger elements come first."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` and `metadata` into the file `path`, which is emptied first.

    Raises:
        OSError: The file cannot be written.
    """
    with path.open("wb") as file:
        file.writelines(_parts(tensors, metadata))


def tensors_to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return what a file with `tensors` and `metadata` contains."""
    return b"".join(_parts(tensors, metadata or {}))


def _parts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Yield the header, then the data of each tensor."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    about: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in names:
        tensor = tensors[name]
        stop = at + tensor.nbytes
        about[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, stop]}
        at = stop
    header = json.dumps(about, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    yield len(header).to_bytes(8, "little") + header
    for name in names:
        if tensors[name].numel():
            yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
