"""Saves a session's cache as a safetensors file, atomically and with a checksum."""

from __future__ import annotations

import hashlib
import json
import zlib
from array import array
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from streamchat.base.atomic_files import advice_on, atomic_write
from streamchat.base.errors import StoreError, reason_of, short
from streamchat.cache.checkpoint import CacheCheckpoint
from streamchat.cache.form import Form
from streamchat.sessions.tensor_file import write_tensors

FORMAT = 2
"""Format version of files with keys and values as numbers. Version 1 is read as well; it has a SHA-256 of all bytes,
which takes three times as long as the CRC-32 of each tensor."""
QUANTIZED_FORMAT = 3
"""Format version of files with codes and scales."""
LATEST_INDEX = 2**62
"""Limit of indices and counts, which a tensor can hold."""
_KEY = "streamchat"
_IDS, _GENERATOR = "ids", "generator"
_PAIRS = {
    "keys": "values",
    "values": "keys",
    "original_keys": "original_values",
    "original_values": "original_keys",
    "key_scales": "value_scales",
    "value_scales": "key_scales",
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
    facts: dict[str, Any] = {
        "format": QUANTIZED_FORMAT if any(name.endswith("_scales") for name in tensors) else FORMAT,
        "session": snapshot.session,
        "fingerprint": snapshot.fingerprint,
        "dtype": snapshot.dtype,
        "settings": snapshot.settings,
        "cache": {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint) if f.name not in ("tensors", "form")},
    }
    if checkpoint.form is not None:
        facts["cache"]["form"] = [checkpoint.form.generation, checkpoint.form.epoch]
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
            if facts["format"] not in (1, FORMAT, QUANTIZED_FORMAT):
                raise SnapshotError(
                    f"its saved cache has format {short(facts['format'], 40)} and this streamchat reads 1 to "
                    f"{QUANTIZED_FORMAT}"
                )
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
        cache["plain"],
        bool(cache["stale"]),
        Form(*_counts(cache["form"])) if "form" in cache else None,
    )
    texts = [facts[name] for name in ("session", "fingerprint", "dtype")] + list(cache["plain"])
    are_objects = isinstance(facts["settings"], dict) and isinstance(cache["plain"], dict)
    if not are_objects or not all(isinstance(text, str) for text in texts):
        raise TypeError("settings or texts")
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
    """Check that each layer's tensors, `original_` ones included, are (batch, num_kv_heads, length, head_dim).

    Codes of 4 bits have half as many bytes as the head has dimensions, and scales have no last dimension.
    """
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part in _PAIRS:
            like = tensors[f"{layer}.{_codes_of(part)}"]
            width = like.shape[3] * (2 if like.dtype == torch.uint8 else 1)
            sizes = {"keys": like.shape[3], "values": like.shape[3], "original_keys": width, "original_values": width}
            size = (sizes[part],) if part in sizes else ()
            length = tensor.shape[2]
            if like.dim() != 4 or tensor.shape != (*like.shape[:2], length, *size) or length > like.shape[2]:
                raise ValueError(f"{name} has the shape {tuple(tensor.shape)}")
            if not size and length != like.shape[2]:
                raise ValueError(f"{name} has {length} tokens")
            is_code = like.dtype in (torch.int8, torch.uint8)
            if is_code != (f"{layer}.{_scales_of(part)}" in tensors):
                raise ValueError(f"{name} lacks scales, or has scales for numbers")
            other = tensors[f"{layer}.{_PAIRS[part]}"]
            if other.shape[2] != length:
                raise ValueError(f"{name} has {length} tokens")


def _codes_of(part: str) -> str:
    return "keys" if "key" in part else "values"


def _scales_of(part: str) -> str:
    return "key_scales" if "key" in part else "value_scales"


def _counts(values: list[Any]) -> tuple[int, ...]:
    if not all(type(value) is int and 0 <= value <= LATEST_INDEX for value in values):
        raise TypeError(f"{values} are not counts")
    return tuple(values)


def _runs(values: list[Any]) -> tuple[tuple[int, int], ...]:
    """Return runs [first, stop), checked to be in increasing order."""
    edges = [edge for first, stop in values for edge in _counts([first, stop])]
    if edges != sorted(edges):
        raise ValueError(f"{values} are not runs")
    return tuple((first, stop) for first, stop in values)


def _checksum(tensors: dict[str, Tensor], facts: dict[str, Any]) -> str:
    """Return the SHA-256 of the facts without the checksum, and of names, dtypes, shapes and checksums of the tensors.

    The checksum of a tensor is its CRC-32, which finds damage. In format 1, its bytes are part of the SHA-256.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data = _bytes(tensor)
        digest.update(data if facts.get("format") == 1 else f" {zlib.crc32(data):08x} ".encode())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    """Return the bytes of a tensor on the CPU as a buffer, which shares its memory."""
    if not tensor.numel():
        return b""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
