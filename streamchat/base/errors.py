"""The errors that users see. Each is one sentence and has an exit code.

StreamchatError
├── ConfigError            a setting is unknown, of the wrong type or impossible       exit 2
├── ModelError             a model cannot be found, fetched, read or used              exit 3
│   ├── ModelNotFoundError     no local model has that name, and none could be fetched
│   ├── UnsupportedModelError  found, but it cannot stream (the text says why)
│   └── OutOfMemoryError       memory ran out
├── CacheError             an operation on the cache is impossible                     exit 1
│   ├── ChunkTooLargeError     more new tokens than fit next to the pinned ones
│   ├── CacheFullError         the budget is reached and nothing may be evicted
│   ├── EvictionPlanError      an eviction policy made a plan that breaks a rule
│   └── CacheNotSeenError      a forward pass ran under the hook without the streaming cache
├── LimitError             no more open files or threads are allowed                   exit 1
├── OutputError            stdout cannot be written, for example to a full disk        exit 1
│   └── HungUpError            the terminal was closed                                 exit 129
├── WireError              another process wrote an invalid request or event           exit 1
├── TurnError              one turn failed and was rolled back; the chat continues     exit 1
└── StoreError             saved sessions cannot be read or written                    exit 5
    └── SessionError           a session does not exist, or is open elsewhere
        └── MissingSessionError    no session has this id
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Literal

from streamchat.base.out_of_memory import OUT_OF_MEMORY, is_out_of_memory
from streamchat.base.sanitize import encodable, sentence


class ExitCode(IntEnum):
    """Exit codes of the process."""

    OK = 0
    FAILURE = 1
    """Something failed at run time, for example a turn of a piped conversation or writing to stdout."""
    USAGE = 2
    """A flag, an environment variable or a configuration file is wrong."""
    MODEL = 3
    """The model cannot be found, fetched, read or used, or memory ran out."""
    CHECK_FAILED = 4
    """A check of `streamchat verify`, or an invariant of `streamchat replay`, does not hold."""
    STORE = 5
    """Saved sessions cannot be read or written, or the requested one does not exist or is open elsewhere."""
    HUNG_UP = 129
    """The terminal was closed (128 + SIGHUP, as in shells)."""
    INTERRUPTED = 130
    """Ctrl+C outside a reply (128 + SIGINT, as in shells)."""
    BROKEN_PIPE = 141
    """The reader of stdout has exited (128 + SIGPIPE, as in shells)."""
    TERMINATED = 143
    """Ended by SIGTERM (128 + SIGTERM, as in shells)."""


TOO_MANY_FILES = "too many open files; raise the limit of this shell, for example with `ulimit -n 1024`"
NO_THREAD = "no thread could be started; close other programs, or raise the limit of this shell (ulimit -u)"


class StreamchatError(Exception):
    """Base of all errors written for the user: one printable sentence with the values and the next step."""

    exit_code = ExitCode.FAILURE
    title = "streamchat failed"

    def __init__(self, message: str = "") -> None:
        # A sentence repeats names and values of files, which may have control characters and line ends.
        super().__init__(sentence(message))


class ConfigError(StreamchatError):
    """A setting is unknown, of the wrong type or impossible."""

    exit_code = ExitCode.USAGE
    title = "Wrong setting"


class ModelError(StreamchatError):
    """A model cannot be found, fetched, read or used."""

    exit_code = ExitCode.MODEL
    title = "Model not available"


class ModelNotFoundError(ModelError):
    """No local model has that name, and none could be fetched."""


class UnsupportedModelError(ModelError):
    """The model was found, but a streaming cache would give wrong results with it."""


class OutOfMemoryError(ModelError):
    """Memory ran out, or the limit of the shell is reached."""

    title = "Out of memory"


class LimitError(StreamchatError):
    """The system or the shell allows no more open files or threads."""

    title = "A limit is reached"


class CacheError(StreamchatError):
    """An operation on the cache is impossible."""

    title = "Cache error"


class ChunkTooLargeError(CacheError, ValueError):
    """More new tokens in one forward pass than fit next to the sinks and pinned tokens."""


class CacheFullError(CacheError):
    """The budget is reached and nothing may be evicted."""


class EvictionPlanError(CacheError):
    """An eviction policy made a plan that breaks a rule; nothing was evicted."""


class CacheNotSeenError(CacheError, RuntimeError):
    """A forward pass ran under the streaming hook without the streaming cache."""


TurnFailure = Literal["", "not_finite", "out_of_memory", "cache_full", "other"]
"""Why a turn failed; '' if it did not. `not_finite`: the model produced NaN or infinite logits."""


class TurnError(StreamchatError):
    """One turn failed and was rolled back.

    Args:
        message: One sentence for the user.
        failure: Why it failed.
    """

    title = "The turn failed"

    def __init__(self, message: str, failure: TurnFailure = "other") -> None:
        super().__init__(message)
        self.failure = failure


class WireError(StreamchatError):
    """Another process, or another version, wrote an invalid request, event or record of figures."""

    title = "Not a valid message"


class OutputError(StreamchatError):
    """stdout cannot be written, for example to a full disk. Not an `OSError`, which argparse and others suppress."""

    title = "Output"


class HungUpError(OutputError):
    """The terminal that stdout writes to was closed."""

    exit_code = ExitCode.HUNG_UP


class StoreError(StreamchatError):
    """Saved sessions cannot be read or written."""

    exit_code = ExitCode.STORE
    title = "Saved conversations"


class SessionError(StoreError):
    """A saved session does not exist, or cannot be opened now."""


class MissingSessionError(SessionError):
    """No saved session has this id, so trying again cannot help."""


def first_line(error: object) -> str:
    """Return the first non-blank line of an error's text; if there is none, the name of its type."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def describe_unexpected(error: BaseException) -> str:
    """Return `ValueError: the first line of its text` for an error that was not written for the user."""
    name, text = type(error).__name__, first_line(error)
    return name if text == name else f"{name}: {text}"


def limit_reached(error: BaseException) -> StreamchatError | None:
    """Return the error to show if the system refused memory, a file, or a thread; None for any other error."""
    return OutOfMemoryError(OUT_OF_MEMORY) if is_out_of_memory(error) else _file_or_thread_limit(error)


def raise_limit(error: BaseException) -> None:
    """Raise `LimitError` if the system refused a file or a thread: what could not be read may be in order."""
    if (limit := _file_or_thread_limit(error)) is not None:
        raise limit from error


def _file_or_thread_limit(error: BaseException) -> LimitError | None:
    text = str(error)
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text:
        return LimitError(TOO_MANY_FILES)
    if "can't start new thread" in text or "ThreadPoolBuildError" in text:  # Python's, and the tokenizers'
        return LimitError(NO_THREAD)
    return None


def reason_of(error: object) -> str:
    """Return the error's text; for an `OSError`, the system's text without number and path."""
    return str(getattr(error, "strerror", None) or error) or type(error).__name__


def short(error: object, limit: int = 160) -> str:
    """Return the text of a library's error for use inside a sentence.

    The text is on one line, without control characters, surrogates and a final period, cut at `limit` characters.
    """
    text = re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", encodable(str(error))).strip() or type(error).__name__
    return (text if len(text) <= limit else text[: limit - 1].rstrip() + "…").rstrip(".")


@contextmanager
def refuse(what: str, advice: str) -> Iterator[None]:
    """Convert any error of a library that reads a model's files into one sentence.

    Damaged files cause errors of all types.

    Args:
        what: What failed, without the reason: "a.gguf cannot be read".
        advice: What to do next.

    Raises:
        UnsupportedModelError: For every `Exception` inside that is not already a `ModelError`.
        LimitError: If the system allowed no more files or threads.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise_limit(error)
        raise UnsupportedModelError(f"{what} ({short(error)}); {advice}") from error
