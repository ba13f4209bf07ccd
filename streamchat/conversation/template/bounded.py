"""Runs code that comes with a model, such as its chat template, with limits on time and memory."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

import psutil

Result = TypeVar("Result")
POLL_S = 0.01
MOST_STEP_S = 0.1
"""Elapsed time that one poll counts at most, where CPU time is not known: the process may have been stopped."""


class LimitError(Exception):
    """The code exceeded its limit on time or memory; the text says which."""


@dataclass
class TimeLimit:
    """A limit on the time of several pieces of code together."""

    seconds: float
    used: float = 0.0

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return max(0.0, self.seconds - self.used)


def run_bounded(
    work: Callable[[], Result],
    *,
    seconds: float = 5.0,
    growth_bytes: int = 500_000_000,
    in_all: TimeLimit | None = None,
) -> Result:
    """Return the result of `work`, or stop it when it exceeds a limit.

    `work` runs in a separate thread, so this can be called from any thread; signals and alarms would need the main one.
    The thread is stopped between two Python bytecodes. A thread that hangs inside a library is abandoned and does not
    prevent the process from exiting. Time is CPU time where the system reports that of another thread (Linux), so
    neither a busy machine nor a process that is stopped for a while counts.

    Args:
        work: Pure Python code without arguments.
        seconds: Time limit.
        growth_bytes: Limit on the growth of this process's memory.
        in_all: A limit for this and other calls together.

    Raises:
        LimitError: `work` exceeded a limit.
        Exception: Whatever `work` raises.
    """
    memory = psutil.Process().memory_info
    start, most = memory().rss, seconds if in_all is None else min(seconds, in_all.left)
    thread = _Work(work)
    thread.start()
    reason = ""
    while not reason and not thread.done.wait(POLL_S):
        if memory().rss - start > growth_bytes:
            reason = f"it uses more than {growth_bytes // 1_000_000:,} MB of memory"
        elif thread.used_s() > most:
            reason = f"it did not finish within {most:g} s"
    if reason:
        thread.stop()
    if in_all is not None:
        in_all.used += thread.used_s()
    if memory().rss - start > growth_bytes / 10:
        gc.collect()  # what a template leaves may refer to itself, and the next one would add to it
    if reason:
        raise LimitError(reason)
    return thread.result()


class _Stopped(BaseException):
    """Raised inside the work. Not an `Exception`, so that a template cannot catch it."""


class _Work(threading.Thread, Generic[Result]):
    def __init__(self, work: Callable[[], Result]) -> None:
        super().__init__(name="bounded", daemon=True)
        self._work = work
        self._results: list[Result] = []
        self._error: Exception | None = None
        self.done = threading.Event()
        self._ending = threading.Lock()
        self._clock: int | None = None
        self._used_s, self._seen = 0.0, time.monotonic()

    def used_s(self) -> float:
        """Return the time that the work has used so far, in seconds."""
        if self._clock is not None:
            with suppress(OSError):  # the thread has ended
                self._used_s = time.clock_gettime(self._clock)
        else:
            before, self._seen = self._seen, time.monotonic()
            self._used_s += min(self._seen - before, MOST_STEP_S)
        return self._used_s

    def run(self) -> None:
        if hasattr(time, "pthread_getcpuclockid"):
            self._clock = time.pthread_getcpuclockid(threading.get_ident())
        try:
            try:
                self._results.append(self._work())
            except Exception as error:
                self._error = error
            with self._ending:
                self.done.set()
        except _Stopped:
            self._results.clear()
            self.done.set()

    def stop(self) -> None:
        """Raise `_Stopped` in the thread, once, and wait at most a second for it to end."""
        with self._ending:  # not after the work has finished, where nothing would catch it
            if not self.done.is_set():
                raise_in(self, _Stopped)
        self.done.wait(1)

    def result(self) -> Result:
        if self._error is not None:
            raise self._error
        return self._results[0]


def raise_in(thread: threading.Thread, error: type[BaseException]) -> None:
    """Raise `error` in another thread before its next Python bytecode."""
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(error))
