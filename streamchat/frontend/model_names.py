"""Completions for `/model`: the default model, aliases, models in the local Hub cache, paths."""

from __future__ import annotations

import os
import time
from functools import lru_cache

from streamchat.base.paths import user_path
from streamchat.frontend import mentions

REFRESH_S = 10
"""Seconds until the list of cached models is read again; reading opens a few files per model."""


def complete_model(typed: str) -> list[tuple[str, str]]:
    """(name, explanation) of models whose name starts with `typed`."""
    if typed.startswith((".", "/", "~")):
        return _paths(typed)
    start = typed.lower()
    return [
        (name, note)
        for name, note in _known_models(int(time.monotonic() / REFRESH_S))
        if name.lower().startswith(start)
    ]


def _paths(typed: str) -> list[tuple[str, str]]:
    """Folders and GGUF files. The contents of a model folder are not listed."""
    if _is_model(typed):
        return [(typed, "model folder")]
    return [
        (path, "model folder" if note == "folder" and _is_model(path) else note)
        for path, note in mentions.complete_path(typed)
        if note == "folder" or path.lower().endswith(".gguf")
    ]


def _is_model(path: str) -> bool:
    return os.path.isfile(user_path(path) / "config.json")


@lru_cache(1)
def _known_models(period: int) -> tuple[tuple[str, str], ...]:
    from streamchat.base.formatting import human_bytes
    from streamchat.models import catalogue
    from streamchat.models.hub_cache import cached_models

    here = {model.repo_id: human_bytes(model.file_bytes) for model in cached_models()}
    known = [(catalogue.DEFAULT, "the default model, SmolLM2-135M-Instruct")]
    for alias, repo_id in catalogue.ALIASES.items():
        known.append((alias, f"{repo_id} (cached, {here[repo_id]} on disk)" if repo_id in here else repo_id))
    known += [(repo_id, f"cached, {size} on disk") for repo_id, size in here.items()]
    return tuple(known)
