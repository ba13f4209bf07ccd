"""Download of a model from the Hub: a quick check that it answers, then only the files that are needed.

Prints nothing and does not retry for long. Offline, unknown and gated models each raise an error of one sentence.
"""

from __future__ import annotations

import contextlib
import fnmatch
import http.client
import json
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from streamchat.base.errors import ModelNotFoundError, UnsupportedModelError, reason_of, short
from streamchat.base.formatting import human_bytes
from streamchat.base.progress import Progress
from streamchat.models import catalogue
from streamchat.models.folder import CONFIG, INDEX, WEIGHTS, check_kind, shard_names
from streamchat.models.hub_cache import cached_snapshot, endpoint, hub_cache_dir, offline_variable
from streamchat.models.quiet import quiet
from streamchat.models.staging import check_space

PROBE_S = 4.0
ANSWER_S = 10.0
"""Timeout of one request to a reachable Hub, in seconds."""
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


def fetch_from_hub(repo_id: str, asked: str, *, progress: Progress) -> Path:
    """Fetch `repo_id` into the Hub cache and return its snapshot folder.

    Args:
        repo_id: Hub id.
        asked: What the user typed, for the message.
        progress: Called with bytes; may raise to cancel.

    Raises:
        ModelNotFoundError: Offline, unknown, gated or incomplete.
        UnsupportedModelError: Not a causal language model, or no safetensors.
    """
    with quiet():
        tried = _lookup_failure(repo_id, asked)
        if variable := offline_variable():
            raise ModelNotFoundError(
                f"{tried}, and {variable} forbids asking the Hub; unset it, or {_local_ways(asked)}"
            )
        progress(f"Looking for {repo_id}", 0, 0, "")
        if (reason := _unreachable(endpoint())) is not None:
            raise ModelNotFoundError(
                f"{tried}, and {_host()} cannot be reached ({reason}); connect, or {_local_ways(asked)}"
            )
        files = _list_files(repo_id, asked)
        check_kind(_read_config(repo_id, files[CONFIG]), repo_id)
        wanted = _files_to_fetch(repo_id, files)
        folder = hub_cache_dir()
        folder.mkdir(parents=True, exist_ok=True)
        check_space(folder, sum(wanted.values()), repo_id, "HF_HOME")
        _download(repo_id, wanted, progress)
    snapshot = cached_snapshot(repo_id)
    if snapshot is None:
        raise ModelNotFoundError(f"{repo_id} was fetched but lacks files that a model needs; choose another model")
    return snapshot


def _host() -> str:
    return urlsplit(endpoint()).netloc or endpoint()


def _lookup_failure(repo_id: str, asked: str) -> str:
    if asked == repo_id:
        return f"{asked!r} is not a folder, a .gguf file or an alias, and not in the local Hub cache"
    return f"{asked!r} means {repo_id}, which is not in the local Hub cache"


def _local_ways(asked: str) -> str:
    known = catalogue.lookup(asked) is not None or asked in catalogue.ALIASES.values()
    hint = "" if known else catalogue.did_you_mean(asked)
    return f"use a local folder or .gguf file, or the default model (--model {catalogue.DEFAULT}){hint}"


def _unreachable(url: str) -> str | None:
    """Return why the Hub does not answer, or None. Takes at most `PROBE_S` + 1 s, even if the name lookup hangs."""
    answer: list[str | None] = []

    def ask() -> None:
        answer.append(_ask(url))

    # A daemon thread, because a hanging name lookup cannot be interrupted.
    thread = threading.Thread(target=ask, name="hub-probe", daemon=True)
    thread.start()
    thread.join(PROBE_S + 1)
    return answer[0] if answer else f"no answer within {PROBE_S + 1:.0f} s"


def _ask(url: str) -> str | None:
    try:
        # urllib honours the user's proxy variables
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_S):
            return None
    except urllib.error.HTTPError:
        return None  # the Hub answered; the status does not matter
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLError):
            return None  # reachable; huggingface_hub brings its own certificates
        return short(reason_of(error.reason), 80)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return short(error, 80)


@contextlib.contextmanager
def _hub_errors(repo_id: str, asked: str) -> Iterator[None]:
    """Turn errors of huggingface_hub and of the connection into `ModelNotFoundError`."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelNotFoundError(
            f"{repo_id} is open only to people who accepted its terms: accept them on {endpoint()}/{repo_id}, then run "
            "`hf auth login`, or choose another model"
        ) from error
    except errors.RepositoryNotFoundError as error:
        hint = catalogue.did_you_mean(asked) or "; check the spelling (`streamchat models` lists the aliases)"
        raise ModelNotFoundError(
            f"There is no model {repo_id} on {_host()}, or it is private and needs `hf auth login`{hint}"
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise ModelNotFoundError(f"{_host()} answered {status} for {repo_id}; try again later") from error
    except errors.HFValidationError as error:
        raise ModelNotFoundError(f"{asked!r} is not a valid Hub id (owner/name)") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise ModelNotFoundError(f"{repo_id} could not be fetched from {_host()}: {short(error)}; try again") from error
    except Exception as error:
        # versions of huggingface_hub use different HTTP libraries
        if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"):
            raise ModelNotFoundError(
                f"The connection to {_host()} broke while asking for {repo_id} ({short(error, 80)}); try again"
            ) from error
        raise


def _list_files(repo_id: str, asked: str) -> dict[str, int]:
    """Return the size in bytes of each file in the top folder of the repository, by name."""
    from huggingface_hub import HfApi

    with _hub_errors(repo_id, asked):
        info = HfApi(endpoint=endpoint()).model_info(repo_id, files_metadata=True, timeout=ANSWER_S)
    files = {file.rfilename: file.size or 0 for file in info.siblings or () if "/" not in file.rfilename}
    if CONFIG not in files:
        ggufs = [name for name in files if name.lower().endswith(".gguf")]
        if ggufs:
            raise UnsupportedModelError(
                f"{repo_id} holds GGUF files only: fetch one of them ({ggufs[0]}) and give its path to --model"
            )
        raise UnsupportedModelError(
            f"{repo_id} has no config.json, so it is not a transformers model; choose another model"
        )
    return files


def _files_to_fetch(repo_id: str, files: dict[str, int]) -> dict[str, int]:
    """Return the files to fetch with their sizes, small files first."""
    small = [name for name in files if any(fnmatch.fnmatch(name, pattern) for pattern in SMALL_FILES)]
    if WEIGHTS in files:
        weights = [WEIGHTS]
    elif INDEX in files:
        weights = [INDEX, *shard_names(_get(repo_id, INDEX))]
        if missing := [name for name in weights if name not in files]:
            raise ModelNotFoundError(f"{repo_id} is incomplete on {_host()}: it lacks {missing[0]}; choose another")
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
        content = json.loads(_get(repo_id, CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedModelError(f"{CONFIG} of {repo_id} is not JSON; choose another model") from error
    return content if isinstance(content, dict) else {}


def _download(repo_id: str, wanted: dict[str, int], progress: Progress) -> None:
    stage, total = f"Fetching {repo_id}", sum(wanted.values())
    before = 0
    for name, size in wanted.items():
        progress(stage, before, total, "bytes")
        _get(repo_id, name, _bar(stage, before, total, progress))
        before += size
    progress(stage, total, total, "bytes")


def _get(repo_id: str, name: str, bar: Any = None) -> Path:
    """Fetch one file of the repository and return its path in the local Hub cache."""
    from huggingface_hub import constants, hf_hub_download

    settings: Any = constants
    xet_off = settings.HF_HUB_DISABLE_XET
    # Plain HTTP: Xet reports progress from its own threads, where raising does not cancel the download.
    settings.HF_HUB_DISABLE_XET = True
    try:
        with _hub_errors(repo_id, repo_id):
            return Path(
                hf_hub_download(
                    repo_id,
                    name,
                    cache_dir=hub_cache_dir(),
                    endpoint=endpoint(),
                    etag_timeout=ANSWER_S,
                    tqdm_class=bar,
                )
            )
    finally:
        settings.HF_HUB_DISABLE_XET = xet_off


def _bar(stage: str, before: int, total: int, progress: Progress) -> Any:
    """Return a class with the part of tqdm's interface that a download uses, which only calls `progress`.

    It is called between two blocks, in our thread, so an exception from `progress` ends the download.
    """

    class Bar:
        def __init__(self, *_args: Any, **kwargs: Any) -> None:
            self.done = int(kwargs.get("initial") or 0)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_error: object) -> None:
            self.close()

        def update(self, n: float | None = 1) -> None:
            self.done += int(n or 0)
            progress(stage, min(before + self.done, total), total, "bytes")

        def close(self) -> None:
            pass

    return Bar
