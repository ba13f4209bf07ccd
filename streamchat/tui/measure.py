"""How large a message is before it is sent: lines and tokens, with the files that it mentions, against the budget."""

from __future__ import annotations

from collections.abc import Callable

from streamchat.base.errors import ConfigError
from streamchat.base.events import CacheState
from streamchat.base.formatting import plural
from streamchat.frontend import mentions

LONG_LINES, LONG_CHARACTERS = 8, 600
"""From here on a text is measured."""
CHARACTERS_A_TOKEN = 4
"""Roughly, until the tokens are counted."""


class MessageSize:
    """The size of the text in the input. `measure` it when the user pauses; the engine's answer goes to `counted`.

    Args:
        count: Asks the engine for the tokens of a text; it answers when it is idle. Asked once at a time.
    """

    def __init__(self, count: Callable[[str], None]) -> None:
        self._count = count
        self._typed = self._whole = ""
        """What was measured last: as typed, and with its files."""
        self._tokens: int | None = None
        self._asked: str | None = None

    def measure(self, typed: str) -> None:
        """Look at the text; asks for its tokens where it is worth it."""
        if typed == self._typed:
            return
        try:
            whole = mentions.expand(typed).text
        except ConfigError:  # told when it is sent
            whole = typed
        self._typed, self._whole, self._tokens = typed, whole, None
        self._ask()

    def counted(self, text: str, tokens: int) -> None:
        """The engine's answer. What came meanwhile is asked for next."""
        self._asked = None
        if text == self._whole:
            self._tokens = tokens
        else:
            self._ask()

    def _ask(self) -> None:
        if self._asked is None and self._tokens is None and self._worth_it(self._whole):
            self._asked = self._whole
            self._count(self._whole)

    def _worth_it(self, text: str) -> bool:
        with_files = text == self._whole and self._whole != self._typed
        return with_files or len(text) > LONG_CHARACTERS or text.count("\n") >= LONG_LINES

    def words(self, typed: str, cache: CacheState) -> str:
        """`340 tokens in 12 lines, 1,020 fit`; empty for a short text."""
        text = self._whole if typed == self._typed else typed
        if not self._worth_it(text):
            return ""
        exact = self._tokens if typed == self._typed else None
        tokens = len(text) // CHARACTERS_A_TOKEN if exact is None else exact
        lines, room = text.count("\n") + 1, cache.cache_size - cache.sinks - cache.pinned
        size = f"{'' if exact is not None else 'about '}{plural(tokens, 'token')} in {plural(lines, 'line')}"
        if not cache.cache_size:
            return size
        if tokens > room:
            return f"{size}, {room:,} fit: its beginning will be forgotten"
        return f"{size}, {room:,} fit"
