"""Matches stop strings on text, independent of token boundaries; no part of a stop string is ever shown."""

from __future__ import annotations

from collections.abc import Sequence

from streamchat.base.errors import ConfigError


class StopMatcher:
    """Passes streamed text through, but holds back a possible start of a stop string.

    Raises:
        ConfigError: A stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise ConfigError("an empty stop string would end every reply at once; give at least one character")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Return the text that may be shown now; '' after a match, when `stopped` is true."""
        if self.stopped:
            return ""
        text = self._held + text
        hits = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if hits:
            self.stopped, self._held = True, ""
            return text[: min(hits)]
        hold = self._possible_start(text)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def flush(self) -> str:
        """Return the text that is held back when the reply ends without a match."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Return the length of the longest suffix of `text` that starts a stop string."""
        longest = max((len(stop) for stop in self._stops), default=0)
        for size in range(min(len(text), longest - 1), 0, -1):
            tail = text[-size:]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0
