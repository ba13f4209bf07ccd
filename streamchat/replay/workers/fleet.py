"""Runs all conversations on workers: assigns jobs, replaces lost workers, and collects the messages."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from streamchat.base.errors import ExitCode
from streamchat.base.formatting import plural
from streamchat.replay.workers.jobs import Job
from streamchat.replay.workers.messages import JobDone, Message, TurnDone, Violated, WorkerLost

_log = logging.getLogger(__name__)

MAX_LOSSES = 3
"""Workers that one conversation may lose before it is given up."""
POLL_S = 0.5


class Worker(Protocol):
    """Runs one job at a time, in another process."""

    def start(self, job: Job) -> None:
        """Start a job."""
        ...

    def stop(self) -> None:
        """Stop the running job after its current turn."""
        ...

    def receive(self) -> Message:
        """Return the next message of the worker, which must have one.

        Raises:
            WorkerLost: The worker has ended.
        """
        ...

    def close(self) -> None:
        """End the worker."""
        ...


W = TypeVar("W", bound=Worker)


@dataclass
class Outcome:
    """The state of one conversation."""

    job: Job
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Its turns, numbered as in the whole run."""
    done: JobDone | None = None
    """How it ended; None if it has not."""
    lost: int = 0
    """Number of workers that it lost."""


class Fleet(Generic[W]):
    """Runs jobs on workers of one kind.

    Args:
        jobs: The conversations.
        start_worker: Starts a worker.
        wait: Returns the given workers that have a message, after at most the given seconds.
        on_turn: Called once for each turn, with its row and whether it was replayed in an earlier run.
        on_message: Called with sentences about violations and lost workers.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        start_worker: Callable[[], W],
        wait: Callable[[Sequence[W], float], Iterable[W]],
        on_turn: Callable[[dict[str, Any], bool], None],
        on_message: Callable[[str], None],
    ) -> None:
        self.outcomes = [Outcome(job) for job in jobs]
        self.stop = threading.Event()
        """If it is set, no further turn starts."""
        self.interrupted = False
        """Whether the user stopped the run."""
        self.failure: JobDone | None = None
        """The end of the first conversation that could not start; no other one is then tried."""
        self._waiting = deque(self.outcomes)
        self._start_worker, self._wait = start_worker, wait
        self._on_turn, self._on_message = on_turn, on_message
        self._running: dict[W, Outcome] = {}
        self._told = False
        self._seen: dict[int, int] = {}

    def run(self, workers: int, time_limit_s: float | None = None) -> None:
        """Run all jobs on at most `workers` workers. All workers are ended at the end, also after an error.

        Args:
            workers: Number of workers.
            time_limit_s: Seconds from now after which no turn starts; None = no limit.
        """
        timer = None if time_limit_s is None else threading.Timer(time_limit_s, self.stop.set)
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            for _ in range(min(workers, len(self._waiting))):
                self._assign(self._start_worker())
            while self._running:
                if self.stop.is_set() and not self._told:
                    self._told = True
                    for worker in self._running:
                        worker.stop()
                for worker in self._wait(list(self._running), POLL_S):
                    self._take(worker)
        finally:
            if timer is not None:
                timer.cancel()
            for worker in self._running:
                worker.close()
            self._running.clear()

    def _assign(self, worker: W) -> None:
        """Give the next conversation to an idle worker, or end it."""
        if self.stop.is_set() or not self._waiting:
            worker.close()
            return
        outcome = self._running[worker] = self._waiting.popleft()
        outcome.rows.clear()  # the worker answers with those that were saved, too
        worker.start(outcome.job)

    def _take(self, worker: W) -> None:
        outcome = self._running[worker]
        try:
            message = worker.receive()
        except WorkerLost as error:
            del self._running[worker]
            worker.close()
            self._lose(outcome, str(error))
            return
        match message:
            case TurnDone(row, is_known):
                self._add(outcome, row, is_known)
            case Violated(sentence):
                self._on_message(f"conversation {outcome.job.number}: {sentence}")
            case JobDone():
                outcome.done = message
                del self._running[worker]
                self._note_failure(outcome, message)
                self._assign(worker)

    def _note_failure(self, outcome: Outcome, done: JobDone) -> None:
        if done.failure and done.info is None and not outcome.rows:  # as for every other conversation
            self.failure = self.failure or done
            self.stop.set()
        elif done.failure:
            self._on_message(f"conversation {outcome.job.number} failed: {done.failure}")

    def _add(self, outcome: Outcome, row: dict[str, Any], is_known: bool) -> None:
        number = outcome.job.number
        row = {**row, "conversation": number}
        outcome.rows.append(row)
        if len(outcome.rows) > self._seen.get(number, 0):
            self._seen[number] = len(outcome.rows)
            self._on_turn(row, is_known)

    def _lose(self, outcome: Outcome, how: str) -> None:
        number, outcome.lost = outcome.job.number, outcome.lost + 1
        where = f"conversation {number}, after {plural(len(outcome.rows), 'turn')}"
        if outcome.lost >= MAX_LOSSES:
            sentence = f"{where}: {outcome.lost} workers were lost ({how})"
            outcome.done = JobDone({}, None, sentence, ExitCode.FAILURE)
            self._on_message(f"{sentence}; it is given up")
        else:
            self._on_message(f"{where}: the worker was lost ({how}); another one continues it")
            self._waiting.appendleft(outcome)
        if self._waiting and not self.stop.is_set():
            self._assign(self._start_worker())
