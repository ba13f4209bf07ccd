"""The local Hub cache and the environment variables of the Hub. Uses no network and no torch."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from streamchat.base.errors import ModelError
from streamchat.base.paths import user_path
from streamchat.models.folder import Contents, inspect
from streamchat.models.hub_gguf import GgufName, is_gguf, matches

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
            found.append(CachedModel(_repo_id(repository), folder, contents.file_bytes))
    return found


@dataclass(frozen=True)
class CachedGguf:
    """A GGUF file in the local Hub cache."""

    repo_id: str
    file: str
    """Path in the repository."""
    path: Path
    """Path on this machine."""
    file_bytes: int


def cached_gguf(name: GgufName) -> CachedGguf | None:
    """Return the GGUF file that `name` means in the local Hub cache: the newest version; None if there is none."""
    for snapshot in _snapshots(_repository(name.repo_id)):
        files = _ggufs_in(name.repo_id, snapshot)
        if found := matches(name, files):
            return files[found[0]]
    return None


def cached_ggufs() -> list[CachedGguf]:
    """Return the GGUF files in the local Hub cache, the newest version of each, sorted by name."""
    found: dict[tuple[str, str], CachedGguf] = {}
    for repository in sorted(hub_cache_dir().glob("models--*")):
        repo_id = _repo_id(repository)
        for snapshot in _snapshots(repository):
            for file, gguf in _ggufs_in(repo_id, snapshot).items():
                found.setdefault((repo_id, file), gguf)
    return [found[key] for key in sorted(found)]


def _ggufs_in(repo_id: str, snapshot: Path) -> dict[str, CachedGguf]:
    """Return the complete GGUF files of a snapshot by their paths in the repository."""
    found = {}
    for path in snapshot.rglob("*"):
        file = path.relative_to(snapshot).as_posix()
        with suppress(OSError):  # a link to a file that was deleted
            if is_gguf(file) and path.is_file():
                found[file] = CachedGguf(repo_id, file, path, path.stat().st_size)
    return found


def _repo_id(repository: Path) -> str:
    return repository.name.removeprefix("models--").replace("--", "/", 1)


def _snapshots(repository: Path) -> list[Path]:
    """Return the snapshots: the one that `main` points to, then the others, newest first."""
    snapshots = repository / "snapshots"
    main = _main(repository)
    found = list(snapshots.iterdir()) if snapshots.is_dir() else []
    found.sort(key=lambda path: (path.name == main, path.stat().st_mtime), reverse=True)
    return found


def _snapshot(repository: Path) -> tuple[Path, Contents] | None:
    """Return the first complete snapshot and its contents: the one that `main` points to, else the newest other one."""
    for folder in _snapshots(repository):
        with suppress(ModelError):
            return folder, inspect(folder)
    return None


def _main(repository: Path) -> str:
    """Return the commit that `main` points to; '' if unknown."""
    try:
        return (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
