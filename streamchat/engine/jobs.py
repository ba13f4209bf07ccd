"""The queue between front ends and the engine's thread: what waits, what runs, and what was stopped."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass, field

from streamchat.base.requests import Request, Stop, TurnRequest


@dataclass(eq=False)
class Job:
    """A request in the queue, or on the engine's thread."""

    request: Request
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set if the user stopped it, or the engine is closing."""
    running: bool = False
    """Whether the model is at work on it."""


class JobQueue:
    """Requests in the order in which they were sent. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._turns: list[Job] = []
        """Running and waiting jobs of `TurnRequest`s, oldest first."""
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def put(self, request: Request) -> None:
        """Queue a request; after `close` it is dropped.

        `Stop` takes effect at once: it cancels the running turn, or the first waiting one.
        """
        if isinstance(request, Stop):
            self._cancel_first()
        else:
            self.put_job(Job(request))

    def put_job(self, job: Job) -> None:
        """Queue a job; after `close` it is dropped."""
        with self._lock:  # also around the queue: turns start in the order in which a stop finds them
            if self._closed.is_set():
                return
            if isinstance(job.request, TurnRequest):
                self._turns.append(job)
            self._queue.put(job)

    def get(self, timeout_s: float) -> Job | None:
        """Return the next job; None if none came in time, or the queue was closed."""
        try:
            return self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def finish(self, job: Job) -> None:
        """Remove the job of a `TurnRequest`, which has ended."""
        with self._lock:
            self._turns.remove(job)

    @property
    def busy(self) -> bool:
        """Whether a turn is running or waiting."""
        with self._lock:
            return bool(self._turns)

    @property
    def running(self) -> bool:
        """Whether the model is at work on a turn."""
        with self._lock:
            return any(job.running for job in self._turns)

    def _cancel_first(self) -> None:
        with self._lock:
            if self._turns:
                self._turns[0].cancelled.set()

    @property
    def closed(self) -> bool:
        """Whether the engine is closing."""
        return self._closed.is_set()

    def close(self) -> None:
        """Cancel all turns and wake up `get`."""
        with self._lock:
            self._closed.set()
            for job in self._turns:
                job.cancelled.set()
        self._queue.put(None)
