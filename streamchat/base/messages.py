"""Small helpers for the sentences of this package, and the type of its progress callback."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from streamchat.base.errors import ModelError, UnsupportedModelError

Progress = Callable[[str, int, int, str], None]
"""Called with (stage in words, done, total or 0 when unknown, unit: "bytes" or ""). It may raise to cancel."""


def silent(_stage: str, _done: int, _total: int, _unit: str) -> None:
    """A `Progress` that shows nothing."""


def short(error: object, limit: int = 160) -> str:
    """The text of a foreign error as part of one sentence: one line, no control characters,
    no final stop, cut at `limit` characters."""
    text = re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", str(error)).strip() or type(error).__name__
    return (text if len(text) <= limit else text[: limit - 1].rstrip() + "…").rstrip(".")


@contextmanager
def refuse(what: str, advice: str) -> Iterator[None]:
    """Turn any error of a library that reads a model's files into one sentence.

    Damaged files raise errors of all kinds.

    Args:
        what: What cannot be done, without the reason: "a.gguf cannot be read".
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
