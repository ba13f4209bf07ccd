"""Passes events from the engine thread to the app's loop, in batches and merged where nothing is lost.

A model that generates 150 tokens per second must not wake the app 150 times per second.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from streamchat.base import events as ev

STREAMED = (ev.TextDelta, ev.StatusSampled, ev.TokensEvicted, ev.PrefillProgress, ev.ModelLoading, ev.ModelFetching)
"""Events that come in quick succession. Any other event, such as the end of a reply, is shown at once."""


class EventBridge:
    """Collects events of one engine. `put` may be called on any thread, `drain` only on the app's thread.

    Args:
        wake: Called on the thread of `put` for the first event after `drain` found no events, and for the first after
            any `drain` that is not `STREAMED`.
    """

    def __init__(self, wake: Callable[[], object]) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._pending: list[ev.Event] = []
        self._woken = self._urged = False
        self._closed = False

    def put(self, event: ev.Event) -> None:
        """Add an event; dropped after `close`."""
        with self._lock:
            if self._closed:
                return
            self._merge(event)
            urgent = not isinstance(event, STREAMED)
            wake = not self._woken or (urgent and not self._urged)
            self._woken, self._urged = True, self._urged or urgent
        if wake:
            try:
                self._wake()
            except RuntimeError:
                # the app's loop has just ended
                self.close()

    def drain(self) -> list[ev.Event]:
        """Return and remove all pending events, oldest first. If there are none, the next `put` wakes the app."""
        with self._lock:
            events, self._pending, self._urged = self._pending, [], False
            if not events:
                self._woken = False
        return events

    def close(self) -> None:
        """Drop pending and future events."""
        with self._lock:
            self._closed = True
            self._pending.clear()

    def _merge(self, event: ev.Event) -> None:
        if isinstance(event, ev.TextDelta):
            self._merge_text(event)
            return
        last = self._pending[-1] if self._pending else None
        match last, event:
            case ev.StatusSampled(), ev.StatusSampled():
                self._pending[-1] = event
            case ev.PrefillProgress(), ev.PrefillProgress() if last.turn == event.turn:
                self._pending[-1] = event
            case ev.ModelLoading(), ev.ModelLoading() if last.stage == event.stage:
                self._pending[-1] = event
            case ev.ModelFetching(), ev.ModelFetching():
                self._pending[-1] = event
            case _:
                self._pending.append(event)

    def _merge_text(self, event: ev.TextDelta) -> None:
        """Append to pending text of the same turn, also if only figures and evictions came in between."""
        for at in range(len(self._pending) - 1, -1, -1):
            last = self._pending[at]
            if isinstance(last, ev.TextDelta) and last.turn == event.turn:
                # pairwise is fine: a batch is a few tokens
                self._pending[at] = ev.TextDelta(event.turn, last.text + event.text)
                return
            if not isinstance(last, ev.StatusSampled | ev.TokensEvicted):
                break
        self._pending.append(event)
