"""The safetensors files of snapshots: written by us, read by the library."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from streamchat.models.tile_file import DTYPES
from streamchat.sessions.tensor_file import write_tensors


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
