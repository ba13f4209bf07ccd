"""Tile files that are damaged, or made to harm, are refused before the kernels read them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Type

from streamchat.base.errors import ModelError
from streamchat.base.progress import silent
from streamchat.models.folder import LAYERS_ENTRY, TILES
from streamchat.models.gguf.convert import converted_copy
from streamchat.models.load import load_model
from tests.support.gguf_models import FAMILIES, write_family
from tests.support.kernels import needs_kernels

NAME = "model.layers.0.self_attn.q_proj.weight"
Change = Callable[[dict[str, Any], dict[str, Any]], Any]
"""(header, its layers) -> other layers, or None for those."""


def damaged(folder: Path, change: Change) -> Path:
    """Return a copy of `folder` with another header of its tile file."""
    copy = folder.parent / "damaged"
    shutil.copytree(folder, copy)
    raw = (folder / TILES).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    layers = json.loads(header["__metadata__"][LAYERS_ENTRY])
    changed = change(header, layers)
    header["__metadata__"][LAYERS_ENTRY] = (
        changed if isinstance(changed, str) else json.dumps(layers if changed is None else changed)
    )
    text = json.dumps(header).encode()
    text = text.ljust(-(-(len(text) + 8) // 64) * 64 - 8)
    (copy / TILES).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    return copy


def says(**entries: Any) -> Change:
    return lambda header, layers: layers[NAME].update(entries)


def few_tiles(header: dict[str, Any], layers: dict[str, Any]) -> None:
    first, stop = header[NAME]["data_offsets"]
    tile = (stop - first) // header[NAME]["shape"][0]
    header[NAME] |= {"shape": [1, *header[NAME]["shape"][1:]], "data_offsets": [first, first + tile]}
    header["rest"] = {"dtype": "U8", "shape": [stop - first - tile], "data_offsets": [first + tile, stop]}


def other_dtype(header: dict[str, Any], layers: dict[str, Any]) -> None:
    count, units, size = header[NAME]["shape"]
    header[NAME] |= {"dtype": "F32", "shape": [count, units, size // 4]}


def longer_units(header: dict[str, Any], layers: dict[str, Any]) -> None:
    count, units, size = header[NAME]["shape"]
    header[NAME]["shape"] = [count // 2, units, size * 2]


@needs_kernels
@pytest.mark.parametrize("weights", ["auto", "native"])
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (few_tiles, "which are not 256 x 256 weights"),
        (other_dtype, "in torch.float32"),
        (longer_units, "which are not 256 x 256 weights"),
        (says(layout="int8_k"), "which are not 256 x 256 weights"),
        (says(layout="int2"), "int2"),
        (says(rows=272), "which are not 272 x 256"),
        (says(columns=512), "which are not 256 x 512"),
        (says(columns=260), "which are not 256 x 260"),
        (says(rows=-5), "how .* is stored"),
        (says(rows=0), "how .* is stored"),
        (says(rows="256"), "how .* is stored"),
        (says(columns=[256]), "how .* is stored"),
        (says(layout=["int4"]), "how .* is stored"),
        (lambda header, layers: {NAME: 5}, "how .* is stored"),
        (lambda header, layers: [1], "not an object"),
        (lambda header, layers: "null", "not an object"),
        (lambda header, layers: "[" * 100_000, "damaged"),
    ],
)
def test_tiles_that_are_not_as_described_are_refused(tmp_path: Path, change: Change, why: str, weights: str) -> None:
    write_family(tmp_path / "a.gguf", FAMILIES["llama"], lambda name: Type.Q4_K)
    shutil.copytree(converted_copy(tmp_path / "a.gguf", progress=silent), tmp_path / "folder")
    with pytest.raises(ModelError, match=why):
        load_model(str(damaged(tmp_path / "folder", change)), device="cpu", dtype="bfloat16", weights=weights)


@needs_kernels
def test_tiles_of_another_kind_of_layer_are_not_served(tmp_path: Path) -> None:
    write_family(tmp_path / "a.gguf", FAMILIES["llama"], lambda name: Type.Q4_K)
    shutil.copytree(converted_copy(tmp_path / "a.gguf", progress=silent), tmp_path / "folder")
    folder = damaged(tmp_path / "folder", says(transposed=True))  # the matrix is square
    with pytest.raises(ModelError, match="another kind of layer"):
        load_model(str(folder), device="cpu", dtype="bfloat16", weights="auto")
