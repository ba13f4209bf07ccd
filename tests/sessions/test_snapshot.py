"""The file of a snapshot: its format, and what is refused, with a checksum that is computed here."""

from __future__ import annotations

import hashlib
import json
import zlib
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from streamchat.cache.checkpoint import CacheCheckpoint
from streamchat.sessions.snapshot import Snapshot, SnapshotError, load, save

Tensors = dict[str, Tensor]


def layer(quantized: bool = False, originals: int = 0) -> Tensors:
    """One layer with 2 key heads, 5 tokens, and head dimension 4."""
    found = {name: torch.arange(40.0).view(1, 2, 5, 4) + len(name) for name in ("0.keys", "0.values")}
    if quantized:
        found = {name: tensor.to(torch.int8) for name, tensor in found.items()}
        found |= {f"0.{name}_scales": torch.ones(1, 2, 5) for name in ("key", "value")}
    if originals:
        found |= {f"0.original_{name}": torch.ones(1, 2, originals, 4) for name in ("keys", "values")}
    return found


def a_snapshot(tensors: Tensors) -> Snapshot:
    checkpoint = CacheCheckpoint(
        tensors, (0,), ((0, 3), (7, 9)), 9, ((0, 3),), (3, 7), 1, {"0.has_previous_state": True}, False
    )
    return Snapshot("abc", checkpoint, array("i", [1, 2, 3, 8, 9]), torch.arange(9), "print", "float32", {"seed": 3})


def parts(path: Path) -> tuple[Tensors, dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        facts: dict[str, Any] = json.loads(file.metadata()["streamchat"])
        return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 - not a dict


def checksum(tensors: Tensors, facts: dict[str, Any]) -> str:
    """As the documentation of the formats says it."""
    stated = {name: value for name, value in facts.items() if name != "checksum"}
    digest = hashlib.sha256(json.dumps(stated, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data = tensor.numpy().tobytes()
        digest.update(data if facts["format"] == 1 else f" {zlib.crc32(data):08x} ".encode())
    return digest.hexdigest()


def write(path: Path, tensors: Tensors, facts: dict[str, Any]) -> None:
    facts = {**facts, "checksum": checksum(tensors, facts)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"streamchat": json.dumps(facts)})


@pytest.mark.parametrize(("quantized", "number"), [(False, 2), (True, 3)])
def test_a_snapshot_is_read_as_it_was_written(tmp_path: Path, quantized: bool, number: int) -> None:
    path, snapshot = tmp_path / "a.safetensors", a_snapshot(layer(quantized, 0 if quantized else 3))
    assert save(path, snapshot) == path.stat().st_size
    tensors, facts = parts(path)
    assert facts["format"] == number
    assert facts["checksum"] == checksum(tensors, facts)
    found = load(path)
    assert found.checkpoint.tensors.keys() == snapshot.checkpoint.tensors.keys()
    for name, tensor in snapshot.checkpoint.tensors.items():
        assert torch.equal(found.checkpoint.tensors[name], tensor)
        assert found.checkpoint.tensors[name].dtype == tensor.dtype
    for name in ("bases", "runs", "next_index", "pins", "turn_starts", "compressions", "plain", "stale"):
        assert getattr(found.checkpoint, name) == getattr(snapshot.checkpoint, name), name
    for name in ("session", "ids", "fingerprint", "dtype", "settings"):
        assert getattr(found, name) == getattr(snapshot, name), name
    assert torch.equal(found.generator, snapshot.generator)


@pytest.mark.parametrize(("number", "is_read"), [(0, False), (1, True), (2, True), (3, True), (4, False), ("2", False)])
def test_formats_1_to_3_are_read(tmp_path: Path, number: Any, is_read: bool) -> None:
    path = tmp_path / "a.safetensors"
    save(path, a_snapshot(layer()))
    tensors, facts = parts(path)
    write(path, tensors, {**facts, "format": number})
    if is_read:
        assert load(path).session == "abc"
    else:
        with pytest.raises(SnapshotError, match="and this streamchat reads 1 to 3"):
            load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"runs": [[0, 3], [2, 4]]},
        {"runs": [[3, 0]]},
        {"pins": [[0, 2**62 + 1]]},
        {"bases": [-1]},
        {"bases": [True]},
        {"next_index": 1.5},
        {"compressions": -1},
        {"plain": [1]},
    ],
)
def test_facts_of_another_kind_are_damage(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "a.safetensors"
    save(path, a_snapshot(layer()))
    tensors, facts = parts(path)
    write(path, tensors, {**facts, "cache": {**facts["cache"], **change}})
    with pytest.raises(SnapshotError, match="its saved cache is damaged"):
        load(path)


@pytest.mark.parametrize("change", [{"session": 1}, {"fingerprint": None}, {"dtype": 2}, {"settings": []}])
def test_texts_of_another_kind_are_damage(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "a.safetensors"
    save(path, a_snapshot(layer()))
    tensors, facts = parts(path)
    write(path, tensors, {**facts, **change})
    with pytest.raises(SnapshotError, match="its saved cache is damaged"):
        load(path)


HALF = torch.zeros(1, 2, 5, 2, dtype=torch.uint8)
SHAPES: dict[str, tuple[bool, Tensors, bool]] = {
    "as they are": (False, {}, True),
    "fewer values": (False, {"0.values": torch.ones(1, 2, 4, 4)}, False),
    "more heads": (False, {"0.values": torch.ones(1, 3, 5, 4)}, True),
    "three dimensions": (False, {"0.keys": torch.ones(2, 5, 4)}, False),
    "originals": (False, {f"0.original_{n}": torch.ones(1, 2, 5, 4) for n in ("keys", "values")}, True),
    "longer originals": (False, {f"0.original_{n}": torch.ones(1, 2, 6, 4) for n in ("keys", "values")}, False),
    "wider originals": (False, {f"0.original_{n}": torch.ones(1, 2, 2, 8) for n in ("keys", "values")}, False),
    "unequal originals": (
        False,
        {"0.original_keys": torch.ones(1, 2, 2, 4), "0.original_values": torch.ones(1, 2, 3, 4)},
        False,
    ),
    "scales for numbers": (False, {f"0.{n}_scales": torch.ones(1, 2, 5) for n in ("key", "value")}, False),
    "codes of 4 bits": (True, {"0.keys": HALF, "0.values": HALF}, True),
    "codes of 4 bits with originals": (
        True,
        {"0.keys": HALF, "0.values": HALF, **{f"0.original_{n}": torch.ones(1, 2, 3, 4) for n in ("keys", "values")}},
        True,
    ),
    "fewer scales": (True, {f"0.{n}_scales": torch.ones(1, 2, 4) for n in ("key", "value")}, False),
    "wide scales": (True, {f"0.{n}_scales": torch.ones(1, 2, 5, 1) for n in ("key", "value")}, False),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_fit_together(tmp_path: Path, name: str) -> None:
    quantized, changes, is_read = SHAPES[name]
    path = tmp_path / "a.safetensors"
    save(path, a_snapshot(layer(quantized) | changes))
    if is_read:
        assert load(path).checkpoint.tensors.keys() == {*layer(quantized), *changes}
    else:
        with pytest.raises(SnapshotError, match="its saved cache is damaged"):
            load(path)


def test_codes_without_scales_are_damage(tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.safetensors", layer(quantized=True)
    del tensors["0.value_scales"], tensors["0.key_scales"]
    save(path, a_snapshot(tensors))
    with pytest.raises(SnapshotError, match="its saved cache is damaged"):
        load(path)
