"""Which messages are still in context, computed from the segments of a `CacheState`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from streamchat.base.events import CacheState, Segment, SegmentPart

Visibility = Literal["visible", "partial", "evicted"]


@dataclass(frozen=True)
class TurnVisibility:
    """How much of a turn is cached."""

    user: Visibility = "visible"
    reply: Visibility = "visible"
    pinned: bool = False
    recalled: bool = False
    """Some of it was evicted and recalled for the newest message."""

    @property
    def evicted(self) -> bool:
        """The whole turn was evicted."""
        return self.user == self.reply == "evicted"

    @property
    def complete(self) -> bool:
        """The whole turn is cached."""
        return self.user == self.reply == "visible"


class ContextView:
    """Per-turn view of one `CacheState`."""

    def __init__(self, cache: CacheState) -> None:
        self._segments: dict[tuple[SegmentPart, int], Segment] = {}
        for segment in cache.segments:
            if segment.turn:
                self._segments[segment.part, segment.turn] = segment
        turns = [turn for _, turn in self._segments]
        self._newest = max(turns, default=0)
        self._nothing_evicted = cache.tokens_evicted == 0
        self.oldest = self._first_of_window()
        """First turn of the window; 0 if the window is empty."""

    def _first_of_window(self) -> int:
        """Return the first of the latest unpinned turns from which on nothing is missing; it may be partly evicted."""
        unpinned = {segment.turn for segment in self._segments.values() if not segment.pinned}
        found, number = 0, self._newest
        while number > 0 and not self.turn(number).evicted:
            if number in unpinned:
                found = number
            if not self.turn(number).complete:
                break
            number -= 1
        return found

    def turn(self, number: int) -> TurnVisibility:
        """The visibility of turn `number`. A turn that is not prefilled yet counts as visible."""
        user, reply = self._segments.get(("user", number)), self._segments.get(("assistant", number))
        pinned = bool(user and user.pinned and (reply is None or reply.pinned))
        recalled = any(segment is not None and segment.recalled for segment in (user, reply))
        if self._nothing_evicted or number > self._newest:
            return TurnVisibility(pinned=pinned)
        if number == self._newest and reply is None:
            # no reply yet
            return TurnVisibility(_visibility(user), "visible", pinned)
        return TurnVisibility(_visibility(user), _visibility(reply), pinned, recalled)


def _visibility(segment: Segment | None) -> Visibility:
    if segment is None:
        return "evicted"
    return "visible" if segment.tokens >= segment.total else "partial"
