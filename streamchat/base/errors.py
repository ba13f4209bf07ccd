"""Errors that a user may meet, each one sentence and one exit code.

StreamchatError
├── ConfigError            a setting is unknown, of the wrong type or impossible       exit 2
├── ModelError             a model cannot be found, fetched, read or used              exit 3
│   ├── ModelNotFoundError     nothing of that name here, or no way to get it
│   └── UnsupportedModelError  found, but it cannot stream (the reason is in the text)
├── CacheError             the cache was asked for something impossible                exit 1
│   ├── ChunkTooLargeError     more new tokens than fit beside the pinned ones
│   ├── CacheFullError         nothing may be evicted and the budget is reached
│   └── CacheNotSeenError      a forward ran under the hook without the streaming cache
├── OutputError            stdout cannot be written: a full device                     exit 1
├── TurnError              one turn failed and was rolled back; the chat goes on       exit 1
└── StoreError             saved conversations cannot be read or written               exit 5
    └── SessionError           a saved conversation is not there, or open elsewhere
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum


class ExitCode(IntEnum):
    """What the process returns to the shell."""

    OK = 0
    FAILURE = 1
    """Something failed while running, for example a turn of a piped conversation, or stdout is on a full device."""
    USAGE = 2
    """A flag, an environment variable or a configuration file is wrong."""
    MODEL = 3
    """The model cannot be found, fetched, read or used."""
    CHECK_FAILED = 4
    """A check of `streamchat verify`, or an invariant of `streamchat replay`, does not hold."""
    STORE = 5
    """Saved conversations cannot be read or written, or the wanted one is not there or open elsewhere."""
    INTERRUPTED = 130
    """Ctrl+C outside a reply, as shells report it (128 + SIGINT)."""
    BROKEN_PIPE = 141
    """Nobody reads the output any more, as shells report it (128 + SIGPIPE)."""
    TERMINATED = 143
    """Ended from outside, as shells report it (128 + SIGTERM)."""


OUT_OF_MEMORY = (
    "the memory of this machine, or the limit of this shell (ulimit -v), is used up; close other programs, raise the "
    "limit or choose a smaller model"
)


class StreamchatError(Exception):
    """Base of all errors whose text is written for the user: one sentence, with the values and the next step."""

    exit_code = ExitCode.FAILURE
    title = "streamchat failed"


class ConfigError(StreamchatError):
    """A setting is unknown, of the wrong type or impossible."""

    exit_code = ExitCode.USAGE
    title = "Wrong setting"


class ModelError(StreamchatError):
    """A model cannot be found, fetched, read or used."""

    exit_code = ExitCode.MODEL
    title = "Model not available"


class ModelNotFoundError(ModelError):
    """No model of that name is here, and it could not be fetched."""


class UnsupportedModelError(ModelError):
    """The model was found, but an endless cache would be wrong with it."""


class CacheError(StreamchatError):
    """The cache was asked for something impossible."""

    title = "Cache error"


class ChunkTooLargeError(CacheError, ValueError):
    """More new tokens in one forward than fit beside the sinks and pinned tokens."""


class CacheFullError(CacheError):
    """The budget is reached and nothing may be evicted."""


class CacheNotSeenError(CacheError, RuntimeError):
    """A forward ran under the streaming hook without the streaming cache."""


class TurnError(StreamchatError):
    """One turn failed and was rolled back."""

    title = "The turn failed"


class OutputError(StreamchatError):
    """stdout cannot be written, as on a full device. No `OSError`: argparse and others would pass over it."""

    title = "Output"


class StoreError(StreamchatError):
    """Saved conversations cannot be read or written."""

    exit_code = ExitCode.STORE
    title = "Saved conversations"


class SessionError(StoreError):
    """A saved conversation is not there, or cannot be opened now."""


def short(error: object, limit: int = 160) -> str:
    """Return the text of a library's error for use inside a sentence.

    The text is on one line, without control characters and without a final period, cut at `limit` characters.
    """
    text = re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", str(error)).strip() or type(error).__name__
    return (text if len(text) <= limit else text[: limit - 1].rstrip() + "…").rstrip(".")


@contextmanager
def refuse(what: str, advice: str) -> Iterator[None]:
    """Turn any error of a library that reads a model's files into one sentence.

    Damaged files raise errors of all kinds.

    Args:
        what: What failed, without the reason: "a.gguf cannot be read".
        advice: What to do next.

    Raises:
        UnsupportedModelError: For every `Exception` inside that is not already a `ModelError`.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(f"{what} ({short(error)}); {advice}") from error
