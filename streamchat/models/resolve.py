"""Meaning of a model name: a path, the bundled default, an alias or a Hub id. Uses no torch and no network."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from streamchat.base.errors import ModelNotFoundError
from streamchat.base.paths import user_path
from streamchat.models import catalogue
from streamchat.models.bundled.default import NAME, default_model_dir, is_default_model_here
from streamchat.models.hub_cache import cached_gguf, cached_snapshot
from streamchat.models.hub_gguf import GgufName, is_hub_id, parse_gguf_name

Kind = Literal["bundled", "folder", "gguf", "hub-cache", "hub"]
GGUF_MAGIC = b"GGUF"


@dataclass(frozen=True)
class Source:
    """Source of a model."""

    kind: Kind
    name: str
    """Display name: 'SmolLM2-135M-Instruct', 'pythia-410m'."""
    location: str
    """Folder, file, or for `hub` the Hub id or the name of a GGUF file there."""
    available: bool
    """Whether it can be loaded without fetching anything."""
    repo_id: str = ""
    """Hub id, for the two Hub kinds and for a GGUF file of the Hub cache."""
    file: str = ""
    """Path of that GGUF file in the repository."""

    @property
    def origin(self) -> str:
        """What the model was loaded from: a folder, a file, or its name on the Hub."""
        return f"{self.repo_id}/{self.file}" if self.file else self.repo_id or self.location


def resolve(name: str) -> Source:
    """Return what `name` means. Order: local path, bundled default, alias, local Hub cache, Hub.

    `owner/repo:TAG` and `owner/repo/file.gguf` mean a GGUF file of the Hub.

    Does not contact the Hub: whether an id exists there is checked when it is fetched.

    Raises:
        ModelNotFoundError: The path does not exist, or `name` is not a valid name.
    """
    name = name.strip()
    if not name:
        raise ModelNotFoundError(f"The model name is empty; give one, or {catalogue.DEFAULT!r} for the default model")
    if name == catalogue.DEFAULT:
        return _bundled()
    path = user_path(name)
    gguf = parse_gguf_name(name)
    if source := _local(path, explicit=gguf is None and _looks_like_path(name)):
        return source
    if gguf is not None:
        return _gguf_on_hub(gguf)
    if catalogue.is_bundled(name):
        return _bundled()
    repo_id = catalogue.lookup(name) or name
    if not is_hub_id(repo_id):
        raise ModelNotFoundError(
            f"{name!r} is not a local folder, a .gguf file, an alias or a valid Hub id (owner/name)"
            f"{catalogue.did_you_mean(name) or '; `streamchat models` lists the available models'}"
        )
    display = repo_id.rpartition("/")[2]
    if snapshot := cached_snapshot(repo_id):
        return Source("hub-cache", display, str(snapshot), True, repo_id)
    if "/" in repo_id and cached_gguf(GgufName(repo_id)) is not None:
        return _gguf_on_hub(GgufName(repo_id))
    return Source("hub", display, repo_id, False, repo_id)


def shadowing_note(name: str, source: Source) -> str:
    """Return a note if a local folder or file hides a model of the same name; '' otherwise."""
    name = name.strip()
    if source.kind not in ("folder", "gguf") or _looks_like_path(name):
        return ""
    if not (catalogue.lookup(name) or (is_hub_id(name) and cached_snapshot(name))):
        return ""
    return (
        f"{name} means the local {source.location} and not the model of that name; start in another folder to use the "
        f"model, or write ./{name} for the local one"
    )


def is_local(name: str) -> bool:
    """Return whether `name` means, or could mean, a local folder or file."""
    is_path = _looks_like_path(name) and parse_gguf_name(name) is None
    return is_path or (name != catalogue.DEFAULT and os.path.exists(user_path(name)))


def _gguf_on_hub(name: GgufName) -> Source:
    """Return the source of a GGUF file of the Hub, in the local Hub cache if it is there."""
    if found := cached_gguf(name):
        return Source("gguf", found.path.stem, str(found.path), True, found.repo_id, found.file)
    display = name.path.rpartition("/")[2].removesuffix(".gguf") or str(name).rpartition("/")[2]
    return Source("hub", display, str(name), False, name.repo_id)


def _bundled() -> Source:
    return Source("bundled", NAME, str(default_model_dir()), is_default_model_here())


def _looks_like_path(name: str) -> bool:
    return (
        name in (".", "..", "~")
        or name.startswith(("./", "../", "~/", "/", ".\\", "..\\"))
        or (os.name == "nt" and bool(re.match(r"[A-Za-z]:|\\\\", name)))
        or name.lower().endswith(".gguf")
        or name.count("/") > 1
    )


def _starts_as_gguf(path: Path) -> bool:
    """Return whether the first bytes are those of a GGUF file; blob stores name files by digest, without a suffix."""
    try:
        with path.open("rb") as file:
            return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    except OSError:
        return False


def _local(path: Path, *, explicit: bool) -> Source | None:
    """Return the folder or file at `path`. `explicit` paths must exist; other names may be an alias or a Hub id."""
    # os.path, because the methods of Path raise if the name is too long
    if os.path.isfile(path):
        if path.suffix.lower() == ".gguf" or _starts_as_gguf(path):
            return Source("gguf", path.stem, str(path.resolve()), True)
        if explicit:
            raise ModelNotFoundError(f"{path} is not a model; give its folder, or a GGUF file")
    elif os.path.isdir(path) and (explicit or (path / "config.json").is_file()):
        return Source("folder", path.resolve().name, str(path.resolve()), True)
    elif explicit:
        what = "file" if path.suffix.lower() == ".gguf" else "folder"
        raise ModelNotFoundError(
            f"There is no {what} {str(path)!r}; check the path, or give an alias or Hub id (`streamchat "
            "models` lists them)"
        )
    return None
