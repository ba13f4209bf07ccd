"""The local Hub cache and the environment variables of the Hub. Uses no network and no torch."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from streamchat.base.errors import ModelError
from streamchat.base.paths import user_path
from streamchat.models.folder import Contents, inspect

PUBLIC_HUB = "https://huggingface.co"


def hub_cache_dir() -> Path:
    """Return the cache folder of huggingface_hub, from the current environment (the library reads it at import)."""
    for variable, below in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub")):
        if value := os.environ.get(variable):
            return user_path(os.path.expandvars(value)) / below
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return user_path(base) / "huggingface" / "hub"


def endpoint() -> str:
    """Return the address of the Hub, `HF_ENDPOINT` or the public one, without a trailing slash."""
    return (os.environ.get("HF_ENDPOINT") or PUBLIC_HUB).rstrip("/")


def offline_variable() -> str | None:
    """Return the environment variable that forbids access to the Hub, or None."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return name
    return None


def cached_snapshot(repo_id: str) -> Path | None:
    """Return the folder of `repo_id` in the local Hub cache, or None if no complete model is there."""
    found = _snapshot(_repository(repo_id))
    return None if found is None else found[0]


def older_note(repo_id: str, snapshot: Path) -> str:
    """Return a note if `snapshot` is an older version because the one of `main` is incomplete; '' otherwise."""
    main = _main(_repository(repo_id))
    if not main or main == snapshot.name:
        return ""
    return (
        f"The newest version of {repo_id} ({main[:7]}) is incomplete in the local Hub cache, so an older one "
        f"({snapshot.name[:7]}) is used; fetch the model again to get the newest"
    )


def _repository(repo_id: str) -> Path:
    return hub_cache_dir() / f"models--{repo_id.replace('/', '--')}"


@dataclass(frozen=True)
class CachedModel:
    """A usable model in the local Hub cache."""

    repo_id: str
    folder: Path
    file_bytes: int


def cached_models() -> list[CachedModel]:
    """Return the complete causal language models in the local Hub cache, sorted by name."""
    found = []
    for repository in sorted(hub_cache_dir().glob("models--*")):
        if complete := _snapshot(repository):
            folder, contents = complete
            repo_id = repository.name.removeprefix("models--").replace("--", "/", 1)
            found.append(CachedModel(repo_id, folder, contents.file_bytes))
    return found


def _snapshot(repository: Path) -> tuple[Path, Contents] | None:
    """Return the first complete snapshot and its contents: the one that `main` points to, else the newest other one."""
    snapshots = repository / "snapshots"
    main = _main(repository)
    found = list(snapshots.iterdir()) if snapshots.is_dir() else []
    found.sort(key=lambda path: (path.name == main, path.stat().st_mtime), reverse=True)
    for folder in found:
        with suppress(ModelError):
            return folder, inspect(folder)
    return None


def _main(repository: Path) -> str:
    """Return the commit that `main` points to; '' if unknown."""
    try:
        return (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
