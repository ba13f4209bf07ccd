"""The numbered events of one session, so that a front end misses none if it loses its connection."""

from __future__ import annotations

import secrets
from collections import deque
from dataclasses import replace
from itertools import islice

from streamchat.attach.frames import event_text
from streamchat.base import events as ev

MAX_EVENTS = 4096
MAX_CHARACTERS = 2_000_000
"""Maximum total length of the stored events; the newest one is always stored."""


class EventHistory:
    """Numbers events from 1 and keeps the newest. Used on the event loop's thread only."""

    def __init__(self, max_events: int = MAX_EVENTS, max_characters: int = MAX_CHARACTERS) -> None:
        self.id = secrets.token_hex(8)
        self.last = 0
        """Number of the newest event."""
        self._texts: deque[str] = deque()
        self._characters = 0
        self._max_events, self._max_characters = max_events, max_characters
        self._sample: ev.StatusSampled | None = None

    def add(self, event: ev.Event) -> bool:
        """Add an event; return False if it has nothing new and was not added."""
        if isinstance(event, ev.StatusSampled):
            if (
                not event.busy
                and self._sample is not None
                and replace(event, memory=self._sample.memory) == self._sample
            ):
                return False
            self._sample = event
        self.last += 1
        text = event_text(event, self.last)
        self._texts.append(text)
        self._characters += len(text)
        while len(self._texts) > 1 and (len(self._texts) > self._max_events or self._characters > self._max_characters):
            self._characters -= len(self._texts.popleft())
        return True

    def reaches(self, after: int) -> bool:
        """Return whether the history has all events after this number."""
        return self.last - len(self._texts) <= after <= self.last

    def after(self, number: int, count: int = 256) -> list[str]:
        """Return the messages of up to `count` events after this number, which the history reaches."""
        start = number - (self.last - len(self._texts))
        return list(islice(self._texts, start, start + count))
