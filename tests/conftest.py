"""Fixtures for every test: nothing outside the test's own folder is read or written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _isolated(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's home, configuration, models and environment out of every test."""
    for name in list(os.environ):
        if name.startswith(("STREAMCHAT_", "HF_", "TRANSFORMERS_")):
            monkeypatch.delenv(name)
    home: Path = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("STREAMCHAT_HOME", str(home / "streamchat"))
    monkeypatch.setenv("HF_HOME", str(home / "huggingface"))
    monkeypatch.chdir(home)
