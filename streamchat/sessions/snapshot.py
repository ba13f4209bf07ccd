"""Saves a session's cache as a safetensors file, atomically and with a checksum."""

from __future__ import annotations

import hashlib
import json
from array import array
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from streamchat.base.atomic_files import advice_on, atomic_write
from streamchat.base.errors import StoreError, reason_of
from streamchat.cache.checkpoint import CacheCheckpoint
from streamchat.sessions.tensor_file import write_tensors

FORMAT = 1
"""Format version of the file; a program reads only its own version."""
_KEY = "streamchat"
_IDS, _GENERATOR = "ids", "generator"
_PAIRS = {
    "keys": "values",
    "values": "keys",
    "original_keys": "original_values",
    "original_values": "original_keys",
}
"""Parts of a layer, each with the part that must have the same number of tokens."""


@dataclass(frozen=True)
class Snapshot:
    """Contents of a snapshot file."""

    session: str
    checkpoint: CacheCheckpoint
    ids: array[int]
    """Ids of the cached tokens, slot by slot; compared with the store on resume."""
    generator: Tensor
    """State of the random generator."""
    fingerprint: str
    """Fingerprint of the model."""
    dtype: str
    settings: dict[str, Any]


class SnapshotError(Exception):
    """The file cannot be used; the text completes a sentence that starts with 'because'."""


def save(path: Path, snapshot: Snapshot) -> int:
    """Write a snapshot file atomically; return its size in bytes.

    Raises:
        StoreError: The file cannot be written.
    """
    checkpoint = snapshot.checkpoint
    tensors = {f"cache.{name}": tensor for name, tensor in checkpoint.tensors.items()}
    tensors[_IDS] = torch.tensor(snapshot.ids, dtype=torch.int32)
    tensors[_GENERATOR] = snapshot.generator.cpu()
    facts = {
        "format": FORMAT,
        "session": snapshot.session,
        "fingerprint": snapshot.fingerprint,
        "dtype": snapshot.dtype,
        "settings": snapshot.settings,
        "cache": {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint) if f.name != "tensors"},
    }
    facts["checksum"] = _checksum(tensors, facts)
    try:
        for left in path.parent.glob(f".{path.name}.*.part"):  # left by a killed process
            left.unlink(missing_ok=True)
        with atomic_write(path, durable=True) as partial:
            write_tensors(partial, tensors, {_KEY: json.dumps(facts)})
            return partial.stat().st_size
    except OSError as error:
        raise StoreError(
            f"the cache could not be saved to {path}: {reason_of(error)}; {advice_on(error.errno)}"
        ) from error


def load(path: Path) -> Snapshot:
    """Read a snapshot file and verify its checksum.

    Raises:
        SnapshotError: The file is missing, damaged, or in another format version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})[_KEY])
            if not isinstance(facts, dict):
                raise SnapshotError("its saved cache is damaged")
            if facts["format"] != FORMAT:
                raise SnapshotError(f"its saved cache has format {facts['format']} and this streamchat reads {FORMAT}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise SnapshotError("no cache was saved with it") from None
    except MemoryError:
        raise SnapshotError("there was not enough memory to read its saved cache") from None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise SnapshotError("its saved cache is damaged") from error
    except RuntimeError as error:  # of torch, if it cannot map the file
        raise SnapshotError("its saved cache could not be read") from error
    checksum = facts.pop("checksum", "")
    if checksum != _checksum(tensors, facts):
        raise SnapshotError("its saved cache is damaged")
    try:
        return _snapshot(tensors, facts)
    except (KeyError, ValueError, TypeError, IndexError, OverflowError, RuntimeError) as error:
        # parts are missing or have another type although the checksum is correct
        raise SnapshotError("its saved cache is damaged") from error


def _snapshot(tensors: dict[str, Tensor], facts: dict[str, Any]) -> Snapshot:
    ids, generator = tensors.pop(_IDS), tensors.pop(_GENERATOR)
    _check_shapes(tensors)
    cache = facts["cache"]
    next_index, compressions = _counts([cache["next_index"], cache["compressions"]])
    checkpoint = CacheCheckpoint(
        {name.removeprefix("cache."): tensor for name, tensor in tensors.items()},
        _counts(cache["bases"]),
        _runs(cache["runs"]),
        next_index,
        _runs(cache["pins"]),
        _counts(cache["turn_starts"]),
        compressions,
        dict(cache["plain"]),
        bool(cache["stale"]),
    )
    if not isinstance(facts["settings"], dict):
        raise TypeError("settings")
    return Snapshot(
        facts["session"],
        checkpoint,
        array("i", ids.tolist()),
        generator,
        facts["fingerprint"],
        facts["dtype"],
        facts["settings"],
    )


def _check_shapes(tensors: dict[str, Tensor]) -> None:
    """Check that each layer's tensors, `original_` ones included, are (batch, num_kv_heads, length, head_dim)."""
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part in _PAIRS:
            batch, heads, length, size = tensor.shape
            like = tensors[f"{layer}.{part.removeprefix('original_')}"]
            if like.dim() != 4 or (batch, heads, size) != (*like.shape[:2], like.shape[3]) or length > like.shape[2]:
                raise ValueError(f"{name} has the shape {tuple(tensor.shape)}")
            other = tensors[f"{layer}.{_PAIRS[part]}"]
            if other.shape[2] != length:
                raise ValueError(f"{name} has {length} tokens")


def _counts(values: list[Any]) -> tuple[int, ...]:
    if not all(isinstance(value, int) and value >= 0 for value in values):
        raise TypeError(f"{values} are not counts")
    return tuple(values)


def _runs(values: list[Any]) -> tuple[tuple[int, int], ...]:
    """Return runs [first, stop), checked to be in increasing order."""
    edges = [edge for first, stop in values for edge in _counts([first, stop])]
    if edges != sorted(edges):
        raise ValueError(f"{values} are not runs")
    return tuple((first, stop) for first, stop in values)


def _checksum(tensors: dict[str, Tensor], facts: dict[str, Any]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes of the tensors, and of the facts without the checksum."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
