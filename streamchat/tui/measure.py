"""Size of a message before it is sent: lines and tokens, including mentioned files, versus the cache budget."""

from __future__ import annotations

from collections.abc import Callable

from streamchat.base.errors import ConfigError
from streamchat.base.events import CacheState
from streamchat.base.formatting import plural
from streamchat.frontend import mentions

LONG_LINES, LONG_CHARACTERS = 8, 600
"""Minimum size of text to measure."""
CHARACTERS_PER_TOKEN = 4
"""Estimate until the engine has counted the tokens."""


class MessageSize:
    """Size of the text in the input. Call `measure` when the user pauses, and `counted` with the engine's answer.

    Args:
        count: Asks the engine to count the tokens of a text; called again only after its answer.
    """

    def __init__(self, count: Callable[[str], None]) -> None:
        self._count = count
        self._typed = self._whole = ""
        """The text measured last: as typed, and with its files."""
        self._tokens: int | None = None
        self._asked: str | None = None

    def measure(self, typed: str) -> None:
        """Measure the text; asks the engine for a token count if the text is long or has files."""
        if typed == self._typed:
            return
        try:
            whole = mentions.expand(typed).text
        except ConfigError:  # reported when the message is sent
            whole = typed
        self._typed, self._whole, self._tokens = typed, whole, None
        self._ask()

    def counted(self, text: str, tokens: int) -> None:
        """Store the engine's answer, or ask again if the text has changed. No tokens: it could not count them."""
        if text != self._asked:
            return  # another front end of the session has asked
        self._asked = None
        if text == self._whole:
            self._tokens = tokens or None
        else:
            self._ask()

    def _ask(self) -> None:
        if self._asked is None and self._tokens is None and self._is_long(self._whole):
            self._asked = self._whole
            self._count(self._whole)

    def _is_long(self, text: str) -> bool:
        with_files = text == self._whole and self._whole != self._typed
        return with_files or len(text) > LONG_CHARACTERS or text.count("\n") >= LONG_LINES

    def summary(self, typed: str, cache: CacheState) -> str:
        """`340 tokens in 12 lines, 1,020 fit`; '' for a short text."""
        text = self._whole if typed == self._typed else typed
        if not self._is_long(text):
            return ""
        exact = self._tokens if typed == self._typed else None
        tokens = len(text) // CHARACTERS_PER_TOKEN if exact is None else exact
        lines, room = text.count("\n") + 1, cache.cache_size - cache.sinks - cache.pinned
        size = f"{'' if exact is not None else 'about '}{plural(tokens, 'token')} in {plural(lines, 'line')}"
        if not cache.cache_size:
            return size
        if tokens > room:
            return f"{size}, {room:,} fit: its beginning will be evicted"
        return f"{size}, {room:,} fit"
