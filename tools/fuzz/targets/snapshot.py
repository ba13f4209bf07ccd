"""Snapshots of a cache: damaged files, and files with arbitrary metadata and a valid checksum."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file

from streamchat.cache.checkpoint import CacheCheckpoint
from streamchat.sessions import snapshot as snapshots
from streamchat.sessions.snapshot import SnapshotError
from tools.fuzz.target import Target

FACTS, FILE = b"F", b"S"
"""First byte of an input: facts as JSON, or the whole file."""


def run(data: bytes) -> None:
    """Load it, and check what was loaded."""
    path = Path("cache.safetensors")
    path.unlink(missing_ok=True)  # the tensors of the last one may still map it
    if data[:1] == FACTS:
        try:
            facts = json.loads(data[1:])
        except (ValueError, RecursionError):
            return
        _write(path, facts)
    else:
        path.write_bytes(data[1:])
    loaded = snapshots.load(path)
    checkpoint = loaded.checkpoint
    assert isinstance(loaded.session, str)
    assert isinstance(loaded.fingerprint, str)
    assert isinstance(loaded.dtype, str)
    assert isinstance(loaded.settings, dict)
    assert isinstance(checkpoint, CacheCheckpoint)
    assert all(first <= stop for first, stop in (*checkpoint.runs, *checkpoint.pins))
    assert isinstance(checkpoint.plain, dict)
    assert all(isinstance(name, str) for name in checkpoint.plain)
    assert 0 <= checkpoint.next_index < 2**63


def _tensors() -> dict[str, torch.Tensor]:
    keys = torch.arange(24.0).reshape(1, 2, 3, 4)
    return {
        "cache.0.keys": keys,
        "cache.0.values": keys + 1,
        "ids": torch.tensor([5, 6, 7], dtype=torch.int32),
        "generator": torch.zeros(8, dtype=torch.uint8),
    }


def _facts() -> dict[str, Any]:
    cache = {
        "bases": [0],
        "runs": [[0, 3]],
        "next_index": 3,
        "pins": [[0, 1]],
        "turn_starts": [1],
        "compressions": 0,
        "plain": {},
        "stale": False,
    }
    names = {"session": "s1", "fingerprint": "f", "dtype": "float32"}
    return {"format": snapshots.FORMAT, **names, "settings": {"cache_size": 64}, "cache": cache}


def _write(path: Path, facts: Any) -> None:
    """Write a file with these facts and the right checksum."""
    tensors = _tensors()
    if isinstance(facts, dict):
        facts.pop("checksum", None)
        facts["checksum"] = snapshots._checksum(tensors, facts)
    save_file(tensors, path, {snapshots._KEY: json.dumps(facts)})


def seeds() -> dict[str, bytes]:
    """Facts, facts of another version, facts of other types, and a whole file."""
    facts = _facts()
    cache = facts["cache"]
    wrong = {
        "session": {**facts, "session": 5},
        "dtype": {**facts, "dtype": []},
        "format": {**facts, "format": "\x1b[2J\n" * 100},
        "plain": {**facts, "cache": {**cache, "plain": [["a", 1]]}},
        "index": {**facts, "cache": {**cache, "next_index": 10**30}},
    }
    whole = {**facts, "checksum": snapshots._checksum(_tensors(), dict(facts))}
    file = save(_tensors(), {snapshots._KEY: json.dumps(whole)})
    return {
        "facts": FACTS + json.dumps(facts).encode(),
        "old": FACTS + json.dumps({**facts, "format": 0}).encode(),
        "file": FILE + file,
        **{name: FACTS + json.dumps(each).encode() for name, each in wrong.items()},
    }


WORDS = (
    b"null",
    b"[]",
    b"{}",
    b'"a"',
    b"[[0, 3]]",
    b'"format"',
    b"-1",
    b"1e400",
    b"[[5, 2]]",
    b"true",
    b'"\\u001b[2J"',
)
TARGET = Target(
    "snapshot",
    run,
    seeds,
    ("streamchat.sessions.snapshot", "streamchat.cache.checkpoint"),
    (SnapshotError,),
    WORDS,
    suite_runs=300,
)
