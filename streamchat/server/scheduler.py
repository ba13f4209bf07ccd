"""Lets tasks take turns on the thread that owns the model, between two forward passes.

A task is a greenlet: a function that can stop anywhere and continue later on the same thread. The decode loop of the
engine calls `pause` before each forward pass, and needs no change to be interrupted there.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from greenlet import getcurrent, greenlet

_log = logging.getLogger(__name__)
Result = TypeVar("Result")

SLICE_STEPS = 4
"""Forward passes of a task before others take their turn."""
SLICE_S = 0.05
"""Time after which a slice ends earlier: a chunk of a prompt takes longer than a token."""


class _Task:
    def __init__(self, work: Callable[[], None], hub: greenlet) -> None:
        self.greenlet = greenlet(work, hub)
        self.condition: Callable[[], bool] | None = None
        """What it waits for; None if it can run."""

    @property
    def ready(self) -> bool:
        return self.condition is None or self.condition()


class Scheduler:
    """Runs tasks in slices. `submit`, `wake`, and `close` may be called from any thread, the rest on the model's."""

    def __init__(self, steps: int = SLICE_STEPS, seconds: float = SLICE_S) -> None:
        self.max_steps, self._max_seconds = steps, seconds
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tasks: list[_Task] = []
        """In the order in which they came; those that wait for the same thing get it in this order."""
        self._hub: greenlet | None = None
        self._steps, self._slice_end = 0, 0.0
        self._closed = False

    def submit(self, work: Callable[[], None]) -> None:
        """Start a task; it must not raise."""
        self._inbox.put(work)

    def call(self, function: Callable[[], Result], timeout_s: float | None = None) -> Result:
        """Return what `function` returns on the model's thread; waits for it. Not for the model's thread itself.

        Raises:
            TimeoutError: It took longer than `timeout_s`.
            Exception: What `function` raised.
        """
        future: Future[Result] = Future()

        def work() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self.submit(work)
        return future.result(timeout_s)

    def wake(self) -> None:
        """Look at what tasks wait for again, after another thread has changed it."""
        self._inbox.put(None)

    def close(self) -> None:
        """Let `run` return once all tasks are done."""
        self._closed = True
        self.wake()

    def run(self, idle: Callable[[], None], idle_s: float = 1.0) -> None:
        """Run tasks until `close`.

        Args:
            idle: Called when there was nothing to do for `idle_s`.
        """
        self._hub = getcurrent()
        while True:
            self._receive()
            has_run = self._run_round()
            if self._closed and not self._tasks and self._inbox.empty():
                return
            if not has_run and not self._receive(idle_s):
                idle()

    def pause(self) -> None:
        """End the slice of the running task if it is over and another task can run. Called before a forward pass."""
        self._steps += 1
        if self._steps <= self.max_steps and time.perf_counter() < self._slice_end:
            return
        if self._inbox.empty() and not any(task.ready for task in self._tasks if task.greenlet is not getcurrent()):
            self._start_slice()
        else:
            assert self._hub is not None
            self._hub.switch()
        self._steps = 1

    def wait(self, condition: Callable[[], bool]) -> None:
        """Let the running task wait until `condition` holds."""
        assert self._hub is not None
        if condition():
            return
        task = next(task for task in self._tasks if task.greenlet is getcurrent())
        task.condition = condition
        self._hub.switch()

    def _receive(self, timeout_s: float | None = None) -> bool:
        """Add the submitted tasks; wait for one if there is a timeout. Return whether anything came."""
        came = False
        while True:
            try:
                work = self._inbox.get(timeout=timeout_s) if timeout_s else self._inbox.get_nowait()
            except queue.Empty:
                return came
            came, timeout_s = True, None
            if work is not None:
                assert self._hub is not None
                self._tasks.append(_Task(_guarded(work), self._hub))

    def _run_round(self) -> bool:
        """Run a slice of each task that is ready; return whether there was one."""
        has_run = False
        for task in list(self._tasks):
            if task.ready:
                has_run = True
                self._run_slice(task)
        return has_run

    def _run_slice(self, task: _Task) -> None:
        task.condition = None
        self._start_slice()
        task.greenlet.switch()
        if task.greenlet.dead:
            self._tasks.remove(task)

    def _start_slice(self) -> None:
        self._steps, self._slice_end = 0, time.perf_counter() + self._max_seconds


def _guarded(work: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        try:
            work()
        except Exception:
            _log.exception("a task failed")

    return run
