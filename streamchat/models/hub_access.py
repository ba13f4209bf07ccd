"""Requests to the Hub: whether it answers, the files of a repository, and fetching one of them.

Does not retry for long. Every failure is an error of one sentence, in which no token appears.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from streamchat.base.errors import ModelNotFoundError, reason_of, short
from streamchat.base.progress import Progress
from streamchat.models import catalogue
from streamchat.models.hub_cache import endpoint, hub_cache_dir, offline_variable

PROBE_S = 4.0
ANSWER_S = 10.0
"""Timeout of one request to a reachable Hub, in seconds."""
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Environment variables with the user's token, in the order in which huggingface_hub reads them."""
LOG_IN = "set HF_TOKEN or run `hf auth login`"
FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


def require_hub(repo_id: str, asked: str, tried: str, progress: Progress) -> None:
    """Check that the Hub may be asked and answers, before `repo_id` is fetched.

    Args:
        repo_id: Hub id.
        asked: What the user typed.
        tried: Start of the message: what was looked for on this machine.
        progress: Called once; may raise to cancel.

    Raises:
        ModelNotFoundError: The environment forbids it, or the Hub cannot be reached.
    """
    if variable := offline_variable():
        raise ModelNotFoundError(f"{tried}, and {variable} forbids asking the Hub; unset it, or {_local_ways(asked)}")
    progress(f"Looking for {repo_id}", 0, 0, "")
    if (reason := _unreachable(endpoint())) is not None:
        raise ModelNotFoundError(
            f"{tried}, and {host()} cannot be reached ({reason}); connect, or {_local_ways(asked)}"
        )
    _check_token()


def host() -> str:
    """Return the name of the Hub for messages, without a user name or password of `HF_ENDPOINT`."""
    return urlsplit(endpoint()).netloc.rpartition("@")[2] or endpoint()


def page(path: str) -> str:
    """Return the address of a page of the Hub for messages."""
    return f"{urlsplit(endpoint()).scheme or 'https'}://{host()}/{path}"


def token_origin() -> str:
    """Return where the user's token comes from: a variable, or the file of `hf auth login`; '' without a token."""
    from huggingface_hub import constants

    for name in TOKEN_VARIABLES:
        if os.environ.get(name, "").strip():
            return name
    with contextlib.suppress(OSError):
        if Path(constants.HF_TOKEN_PATH).read_bytes().strip():
            return str(constants.HF_TOKEN_PATH)
    return ""


def _check_token() -> None:
    """Refuse a token that cannot be sent in a header; the message does not show it."""
    from huggingface_hub import constants

    origin = token_origin()
    if not origin:
        return
    try:
        token = os.environ.get(origin) or Path(constants.HF_TOKEN_PATH).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        token = "\0"
    # huggingface_hub removes line breaks and surrounding spaces
    if not all("!" <= character <= "~" for character in token.replace("\r", "").replace("\n", "").strip()):
        raise ModelNotFoundError(
            f"the token in {origin} contains characters that no token has; copy it again, or {_without_token(origin)}"
        )


def _without_token(origin: str) -> str:
    return f"unset {origin}" if origin in TOKEN_VARIABLES else "run `hf auth logout`"


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
    """Turn errors of huggingface_hub, of the connection and of the disk into `ModelNotFoundError`."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelNotFoundError(_gated(repo_id)) from error
    except errors.RepositoryNotFoundError as error:
        hint = catalogue.did_you_mean(asked) or "; check the spelling (`streamchat models` lists the aliases)"
        need = f"the token in {origin} may not read it" if (origin := token_origin()) else f"needs a token ({LOG_IN})"
        raise ModelNotFoundError(
            f"There is no model {repo_id} on {host()}, or it is private and {need}{hint}"
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise ModelNotFoundError(_status(repo_id, status)) from error
    except errors.HFValidationError as error:
        raise ModelNotFoundError(f"{asked!r} is not a valid Hub id (owner/name)") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise ModelNotFoundError(f"{repo_id} could not be fetched from {host()}: {short(error)}; try again") from error
    except OSError as error:
        if error.errno not in (*FULL, *NOT_WRITABLE):
            raise
        raise ModelNotFoundError(_not_stored(repo_id, error)) from error
    except Exception as error:
        # versions of huggingface_hub use different HTTP libraries
        if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"):
            raise ModelNotFoundError(
                f"The connection to {host()} broke while asking for {repo_id} ({short(error, 80)}); try again"
            ) from error
        raise


def _gated(repo_id: str) -> str:
    accept = f"accept them on {page(repo_id)}"
    if origin := token_origin():
        return (
            f"{repo_id} is open only to people who accepted its terms, and the token in {origin} is not of one of them "
            f"or may not read it; {accept} with the account of the token, or choose another model"
        )
    return f"{repo_id} is open only to people who accepted its terms: {accept}, then {LOG_IN}, or choose another model"


def _status(repo_id: str, status: object) -> str:
    origin = token_origin()
    if status == 401 and origin:
        return (
            f"{host()} rejected the token in {origin} (401) for {repo_id}; make a new one on "
            f"{page('settings/tokens')}, or {_without_token(origin)}"
        )
    return f"{host()} answered {status} for {repo_id}; try again later"


def _not_stored(repo_id: str, error: OSError) -> str:
    full = error.errno in FULL
    reason, remedy = ("the disk is full", "make room") if full else (short(reason_of(error)), "make it writable")
    return f"{repo_id} could not be stored in {hub_cache_dir()} ({reason}); {remedy}, or set HF_HOME to another folder"


def list_files(repo_id: str, asked: str) -> dict[str, int]:
    """Return the size in bytes of each file of the repository, by its path in it.

    Raises:
        ModelNotFoundError: The repository does not exist, is private, or the Hub does not answer.
    """
    from huggingface_hub import HfApi

    with _hub_errors(repo_id, asked):
        info = HfApi(endpoint=endpoint()).model_info(repo_id, files_metadata=True, timeout=ANSWER_S)
    return {file.rfilename: file.size or 0 for file in info.siblings or ()}


def fetch_files(repo_id: str, wanted: dict[str, int], progress: Progress) -> None:
    """Fetch files of a repository into the local Hub cache.

    Args:
        repo_id: Hub id.
        wanted: Paths in the repository and their sizes in bytes.
        progress: Called with bytes; may raise to cancel.

    Raises:
        ModelNotFoundError: A file is gated, the connection broke, or the disk is full.
    """
    stage, total = f"Fetching {repo_id}", sum(wanted.values())
    before = 0
    for name, size in wanted.items():
        progress(stage, before, total, "bytes")
        fetch_file(repo_id, name, _bar(stage, before, total, progress))
        before += size
    progress(stage, total, total, "bytes")


def fetch_file(repo_id: str, name: str, bar: Any = None) -> Path:
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
