"""From the engine's thread to the app's loop: events are collected, joined where nothing is lost, and taken in batches.

A model that writes 150 tokens a second must not wake the interface 150 times; text is handed over at a steady rate.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

from streamchat.base import events as ev


class EventBridge:
    """Collects events of one engine. `put` may be called on any thread, `take` belongs to the app's.

    Args:
        wake: Called on the thread of `put` when events wait and nobody was told yet; `take` re-arms it.
    """

    def __init__(self, wake: Callable[[], object]) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._waiting: list[ev.Event] = []
        self._woken = False
        self._closed = False

    def put(self, event: ev.Event) -> None:
        """Add an event. After `close` it is dropped."""
        with self._lock:
            if self._closed:
                return
            self._join(event)
            wake, self._woken = not self._woken, True
        if wake:
            try:
                self._wake()
            except RuntimeError:
                # the app's loop has just ended; there is nobody left to tell
                self.close()

    def take(self) -> list[ev.Event]:
        """All events that wait, oldest first. With none, the next `put` wakes the app again."""
        with self._lock:
            events, self._waiting = self._waiting, []
            if not events:
                self._woken = False
        return events

    def close(self) -> None:
        """Drop what waits and what comes."""
        with self._lock:
            self._closed = True
            self._waiting.clear()

    def _join(self, event: ev.Event) -> None:
        last = self._waiting[-1] if self._waiting else None
        match last, event:
            case ev.TextDelta(), ev.TextDelta() if last.turn == event.turn:
                # joined pairwise; a batch is a few tokens
                self._waiting[-1] = replace(last, text=last.text + event.text)
            case ev.StatusSampled(), ev.StatusSampled():
                self._waiting[-1] = event
            case ev.PrefillProgress(), ev.PrefillProgress() if last.turn == event.turn:
                self._waiting[-1] = event
            case ev.ModelLoading(), ev.ModelLoading() if last.stage == event.stage:
                self._waiting[-1] = event
            case _:
                self._waiting.append(event)
