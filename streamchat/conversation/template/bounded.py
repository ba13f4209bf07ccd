"""Runs code that comes with a model, such as its chat template, with limits on time and memory."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import psutil

Result = TypeVar("Result")
POLL_S = 0.01


class LimitError(Exception):
    """The code exceeded its limit on time or memory; the text says which."""


def run_bounded(work: Callable[[], Result], *, seconds: float = 5.0, growth_bytes: int = 500_000_000) -> Result:
    """Return the result of `work`, or stop it when it exceeds a limit.

    `work` runs in a separate thread, so this can be called from any thread; signals and alarms would need the main one.
    The thread is stopped between two Python bytecodes. A thread that hangs inside a library is abandoned and does not
    prevent the process from exiting.

    Args:
        work: Pure Python code without arguments.
        seconds: Time limit.
        growth_bytes: Limit on the growth of this process's memory.

    Raises:
        LimitError: `work` exceeded a limit.
        Exception: Whatever `work` raises.
    """
    memory = psutil.Process().memory_info
    start, end = memory().rss, time.monotonic() + seconds
    thread = _Work(work)
    thread.start()
    reason = ""
    while not reason and not thread.done.wait(POLL_S):
        if memory().rss - start > growth_bytes:
            reason = f"it uses more than {growth_bytes // 1_000_000:,} MB of memory"
        elif time.monotonic() > end:
            reason = f"it did not finish within {seconds:g} s"
    if reason:
        thread.stop()
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

    def run(self) -> None:
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
