"""The safetensors files of snapshots: written by us, read by the library."""

from __future__ import annotations

import gc
import os
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load

from streamchat.models.tile_file import DTYPES
from streamchat.sessions.tensor_file import tensors_to_bytes, write_tensors


def test_every_dtype_and_shape_is_read_to_the_bit(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.randint(0, 100, (2, 3, 5)).to(torch.float32).to(dtype) for dtype in DTYPES}
    tensors |= {
        "empty": torch.zeros(1, 2, 0, 4),
        "scalar": torch.tensor(1.5),
        "strided": torch.arange(12.0).view(3, 4).t(),
    }
    path = tmp_path / "file"
    write_tensors(path, tensors, {"about": "text with é"})
    assert os.listdir(tmp_path) == ["file"]
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"about": "text with é"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert found.contiguous().view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8))


def test_a_failure_leaves_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing would look for it, and it would have what a deleted session said."""
    monkeypatch.setattr(torch.Tensor, "numpy", lambda self: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_tensors(tmp_path / "file", {"a": torch.ones(3)}, {})
    assert os.listdir(tmp_path) == ["file"]


def test_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    tensors, metadata = {"a": torch.arange(5.0), "b": torch.ones(3, dtype=torch.int8)}, {"about": "text"}
    write_tensors(tmp_path / "file", tensors, metadata)
    assert tensors_to_bytes(tensors, metadata) == (tmp_path / "file").read_bytes()
    assert {name: list(x) for name, x in load(tensors_to_bytes(tensors)).items()} == {
        name: list(x) for name, x in tensors.items()
    }


def test_tensors_of_many_sizes_leave_nothing_in_memory() -> None:
    tensors_to_bytes({"x": torch.zeros(1)})
    tracemalloc.start()
    try:
        for size in range(1, 300):
            tensors_to_bytes({"x": torch.zeros(size)})
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()
