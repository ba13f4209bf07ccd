"""Which messages are still in context, computed from the segments of a `CacheState`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from streamchat.base.events import CacheState, Part, Segment

Memory = Literal["seen", "partly", "forgotten"]


@dataclass(frozen=True)
class TurnMemory:
    """How much of a turn is cached."""

    user: Memory = "seen"
    reply: Memory = "seen"
    pinned: bool = False

    @property
    def forgotten(self) -> bool:
        """The whole turn was evicted."""
        return self.user == self.reply == "forgotten"

    @property
    def whole(self) -> bool:
        """The whole turn is cached."""
        return self.user == self.reply == "seen"


class Visible:
    """Per-turn view of one `CacheState`."""

    def __init__(self, cache: CacheState) -> None:
        self._segments: dict[tuple[Part, int], Segment] = {}
        for segment in cache.segments:
            if segment.turn:
                self._segments[segment.part, segment.turn] = segment
        turns = [turn for _, turn in self._segments]
        self._newest = max(turns, default=0)
        self._nothing_evicted = cache.tokens_evicted == 0
        self.oldest = min((segment.turn for segment in self._segments.values() if not segment.pinned), default=0)
        """First turn of the window; 0 if the window is empty."""

    def turn(self, number: int) -> TurnMemory:
        """The visibility of turn `number`. A turn that is not prefilled yet counts as visible."""
        user, reply = self._segments.get(("user", number)), self._segments.get(("assistant", number))
        pinned = bool(user and user.pinned and (reply is None or reply.pinned))
        if self._nothing_evicted or number > self._newest:
            return TurnMemory(pinned=pinned)
        if number == self._newest and reply is None:
            # no reply yet
            return TurnMemory(_memory(user), "seen", pinned)
        return TurnMemory(_memory(user), _memory(reply), pinned)


def _memory(segment: Segment | None) -> Memory:
    if segment is None:
        return "forgotten"
    return "seen" if segment.tokens >= segment.total else "partly"
