"""The models that a user can choose from: the default model, local ones, and aliases. Needs no torch and no network.

Reading the local Hub cache opens a few files per model, so call this on a thread that nobody waits for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from streamchat.base.errors import ModelError
from streamchat.models import catalogue
from streamchat.models.bundled.default import COPY_BYTES, NAME, WHEEL, default_model_dir, is_default_model_here
from streamchat.models.folder import CONFIG, Contents, inspect
from streamchat.models.gguf.header import HeaderError, read_scalars
from streamchat.models.hub_cache import cached_ggufs, cached_models
from streamchat.models.hub_gguf import is_gguf
from streamchat.models.staging import models_dir, read_manifest

HEADROOM = 1.05
"""Memory for weights and buffers, relative to the weights."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MAX_ENTRIES = 2_000
"""Maximum files and folders that are looked at in the current folder."""
Place = Literal["bundled", "hub-cache", "here", "hub"]


@dataclass(frozen=True)
class ModelChoice:
    """A model that a user can choose."""

    name: str
    """In the form that `--model` accepts."""
    label: str
    """What it is, in a few words: the name of the model, or where the file is."""
    place: Place
    source: str
    """As in `ModelInfo.source`: the folder, the file, or the name on the Hub."""
    is_here: bool
    """Whether it can be loaded without fetching anything."""
    size_bytes: int
    """Size on disk, or about that of the download; 0 if unknown."""
    memory_bytes: int
    """About what its weights take in memory; 0 if unknown."""
    context_length: int
    """Tokens that it was trained with; 0 if unknown."""


def model_choices(*, dtype: str = "float32", local_files: bool = True) -> list[ModelChoice]:
    """Return all models that can be chosen: the default one, those on this machine, then the other aliases.

    Args:
        dtype: Dtype that a model would be loaded in.
        local_files: Also list files and folders, in the current folder or converted earlier.
    """
    width = BYTES.get(dtype, 4)
    cached = {model.repo_id: model for model in cached_models()}
    aliases = {repo_id: alias for alias, repo_id in catalogue.ALIASES.items()}
    found = [
        _default(),
        *(_cached(aliases.get(repo_id, repo_id), repo_id, cached[repo_id], width) for repo_id in cached),
    ]
    found += [
        _gguf(f"{each.repo_id}/{each.file}", "in the local Hub cache", each.path, f"{each.repo_id}/{each.file}")
        for each in cached_ggufs()
    ]
    if local_files:
        found += _local(width)
    found += [_alias(alias, repo_id, width) for alias, repo_id in catalogue.ALIASES.items() if repo_id not in cached]
    return found


def _default() -> ModelChoice:
    facts, folder, is_here = catalogue.FACTS[catalogue.DEFAULT], default_model_dir(), is_default_model_here()
    manifest = read_manifest(folder)
    size = sum(manifest["files"].values()) if manifest else WHEEL.size
    memory = int(COPY_BYTES * HEADROOM)
    return ModelChoice(catalogue.DEFAULT, NAME, "bundled", str(folder), is_here, size, memory, facts.context_length)


def _cached(name: str, repo_id: str, model: Any, width: int) -> ModelChoice:
    contents = _contents(model.folder)
    label = repo_id if name != repo_id else "in the local Hub cache"
    return _native(name, label, "hub-cache", repo_id, contents, width)


def _native(name: str, label: str, place: Place, source: str, contents: Contents | None, width: int) -> ModelChoice:
    """Return a model folder with native weights; without contents, it is listed without figures."""
    if contents is None:
        return ModelChoice(name, label, place, source, True, 0, 0, 0)
    memory = int(contents.bytes_as(width) * HEADROOM)
    context = _context_length(contents.config)
    return ModelChoice(name, label, place, source, True, contents.file_bytes, memory, context)


def _contents(folder: Path) -> Contents | None:
    with suppress(ModelError, OSError):
        return inspect(folder)
    return None


def _context_length(config: dict[str, Any]) -> int:
    """Return the context length in a config; 0 if it names none. transformers normalizes names only after an import."""
    parts = [config, config.get("text_config")]
    for part in parts:
        for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
            value = part.get(name) if isinstance(part, dict) else None
            if isinstance(value, int) and value > 0:
                return value
    return 0


def _gguf(name: str, label: str, path: Path, source: str) -> ModelChoice:
    size, context = 0, 0
    with suppress(OSError, HeaderError, ValueError):
        size = path.stat().st_size
        scalars = read_scalars(path)
        value = scalars.get(f"{scalars.get('general.architecture')}.context_length")
        context = value if isinstance(value, int) else 0
    place: Place = "here" if source == str(path) else "hub-cache"
    return ModelChoice(name, label, place, source, True, size, int(size * HEADROOM), context)


def _alias(alias: str, repo_id: str, width: int) -> ModelChoice:
    facts = catalogue.FACTS[alias]
    download = 2 * facts.parameters  # the files have 16-bit weights
    memory = int(width * facts.parameters * HEADROOM)
    return ModelChoice(alias, repo_id, "hub", repo_id, False, download, memory, facts.context_length)


# --- files and folders ------------------------------------------------------------------------------------------


def _local(width: int) -> list[ModelChoice]:
    """Return models in the current folder and its subfolders, then GGUF files that were converted earlier."""
    found: dict[str, ModelChoice] = {}
    for path in islice(_walk(Path(".")), MAX_ENTRIES):
        # os.path, because the methods of Path raise on a link to itself and on a name that is too long
        name, real = f"./{path.as_posix()}", os.path.realpath(path)
        if is_gguf(path.name) and os.path.isfile(path):
            found[real] = _gguf(name, "in this folder", Path(real), real)
        elif _is_model_folder(path) and (contents := _contents(path)) is not None:
            found[real] = _native(name, "in this folder", "here", real, contents, width)
    for source in _converted():
        found.setdefault(str(source), _gguf(str(source), "converted earlier", source, str(source)))
    return list(found.values())


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the visible entries of `folder` and of its subfolders, sorted. Does not follow links to folders."""
    with suppress(OSError):
        with os.scandir(folder) as entries:
            some = sorted(islice(entries, MAX_ENTRIES), key=lambda entry: entry.name)
        visible = [entry for entry in some if not entry.name.startswith(".")]
        for entry in visible:
            yield Path(entry.path)
        if folder == Path("."):
            for entry in visible:
                if entry.is_dir(follow_symlinks=False) and not _is_model_folder(Path(entry.path)):
                    yield from _walk(Path(entry.path))


def _is_model_folder(path: Path) -> bool:
    return os.path.isfile(path / CONFIG)


def _converted() -> Iterator[Path]:
    """Yield the GGUF files that were converted earlier and still exist, without those of the Hub cache."""
    in_hub_cache = {gguf.path for gguf in cached_ggufs()}
    folder = models_dir()
    for copy in sorted(folder.iterdir()) if folder.is_dir() else ():
        manifest = None if copy.name.startswith(".") else read_manifest(copy)
        if not manifest or manifest.get("default"):
            continue
        path = Path(str(manifest.get("source", "")))
        with suppress(OSError, ValueError):
            if path.is_absolute() and path.is_file() and path not in in_hub_cache:
                yield path.resolve()


# --- memory -----------------------------------------------------------------------------------------------------


def free_memory(device: str) -> int | None:
    """Return the bytes that a model could be loaded into on `device` now; None if unknown.

    Asks torch for a GPU, which must then be loaded already.
    """
    from streamchat.models.limits import available_memory

    if device in ("", "cpu"):
        return available_memory()
    if "torch" not in sys.modules:
        return None
    from streamchat.models.device import free_memory as free_of

    return free_of(device)
