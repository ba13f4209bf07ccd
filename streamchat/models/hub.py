"""Download of a model from the Hub: a quick check that it answers, then only the files that are needed.

Prints nothing and does not retry for long. Offline, unknown and gated models each raise an error of one sentence.
"""

from __future__ import annotations

import fnmatch
import json
from typing import Any

from streamchat.base.errors import ModelNotFoundError, UnsupportedModelError
from streamchat.base.formatting import human_bytes
from streamchat.base.progress import Progress
from streamchat.models.folder import CONFIG, INDEX, WEIGHTS, check_kind, shard_names
from streamchat.models.hub_access import fetch_file, fetch_files, host, list_files, require_hub
from streamchat.models.hub_cache import cached_gguf, cached_snapshot, hub_cache_dir
from streamchat.models.hub_gguf import GgufName, choose_file, is_gguf, parse_gguf_name
from streamchat.models.quiet import quiet
from streamchat.models.resolve import Source
from streamchat.models.staging import check_space

SMALL_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "*.jinja",
)


def fetch_from_hub(source: Source, asked: str, *, progress: Progress) -> Source:
    """Fetch `source` into the Hub cache and return the local source: a model folder or a GGUF file.

    A repository without a config.json may hold GGUF files, of which one is fetched.

    Args:
        source: Of kind `hub`.
        asked: What the user typed, for the message.
        progress: Called with bytes; may raise to cancel.

    Raises:
        ModelNotFoundError: Offline, unknown, gated or incomplete; or the disk is full.
        UnsupportedModelError: Not a causal language model, or no safetensors.
    """
    repo_id = source.repo_id
    with quiet():
        require_hub(repo_id, asked, _lookup_failure(source, asked), progress)
        files = list_files(repo_id, asked)
        name = parse_gguf_name(source.location)
        if name is None and CONFIG not in files:
            name = GgufName(repo_id)
            _require_ggufs(repo_id, files)
        if name is not None:
            return _fetch_gguf(name, files, progress)
        files = {path: size for path, size in files.items() if "/" not in path}
        check_kind(_read_config(repo_id, files[CONFIG]), repo_id)
        _fetch(repo_id, _files_to_fetch(repo_id, files), progress)
    snapshot = cached_snapshot(repo_id)
    if snapshot is None:
        raise ModelNotFoundError(f"{repo_id} was fetched but lacks files that a model needs; choose another model")
    return Source("hub-cache", source.name, str(snapshot), True, repo_id)


def _lookup_failure(source: Source, asked: str) -> str:
    if asked in (source.repo_id, source.location):
        return f"{asked!r} is not a folder, a .gguf file or an alias, and not in the local Hub cache"
    return f"{asked!r} means {source.location}, which is not in the local Hub cache"


def _require_ggufs(repo_id: str, files: dict[str, int]) -> None:
    if not any(is_gguf(path) for path in files):
        raise UnsupportedModelError(
            f"{repo_id} has no config.json and no GGUF files, so it is not a language model; choose another model"
        )


def _fetch_gguf(name: GgufName, files: dict[str, int], progress: Progress) -> Source:
    path = choose_file(name, files, host())
    _fetch(name.repo_id, {path: files[path]}, progress)
    found = cached_gguf(GgufName(name.repo_id, path=path))
    if found is None:
        raise ModelNotFoundError(
            f"{path} of {name.repo_id} was fetched but is not in the local Hub cache; fetch it again"
        )
    return Source("gguf", found.path.stem, str(found.path), True, found.repo_id, found.file)


def _fetch(repo_id: str, wanted: dict[str, int], progress: Progress) -> None:
    folder = hub_cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    check_space(folder, sum(wanted.values()), repo_id, "HF_HOME")
    fetch_files(repo_id, wanted, progress)


def _files_to_fetch(repo_id: str, files: dict[str, int]) -> dict[str, int]:
    """Return the files to fetch with their sizes, small files first."""
    small = [name for name in files if any(fnmatch.fnmatch(name, pattern) for pattern in SMALL_FILES)]
    if WEIGHTS in files:
        weights = [WEIGHTS]
    elif INDEX in files:
        weights = [INDEX, *shard_names(fetch_file(repo_id, INDEX))]
        if missing := [name for name in weights if name not in files]:
            raise ModelNotFoundError(f"{repo_id} is incomplete on {host()}: it lacks {missing[0]}; choose another")
    else:
        raise UnsupportedModelError(
            f"{repo_id} has no safetensors weights, only formats that can run code; choose a model that has "
            f"{WEIGHTS}, or convert it once with transformers and give the folder to --model"
        )
    return {name: files[name] for name in (CONFIG, *small, *weights)}


def _read_config(repo_id: str, size: int) -> dict[str, Any]:
    if size > 10_000_000:
        raise UnsupportedModelError(
            f"{CONFIG} of {repo_id} has {human_bytes(size)}, so it cannot be a configuration file"
        )
    try:
        content = json.loads(fetch_file(repo_id, CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnsupportedModelError(f"{CONFIG} of {repo_id} is not JSON; choose another model") from error
    return content if isinstance(content, dict) else {}
