"""A server on a local Ray cluster, on a tiny model."""

from __future__ import annotations

from typing import Any

from streamchat.models.load import LoadedModel
from tests.support.real_engine import tiny_loaded


def load_tiny(*_: Any) -> LoadedModel:
    """The tiny model, in Ray's processes."""
    return tiny_loaded()
