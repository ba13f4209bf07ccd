"""Tasks take turns in slices, and wait without blocking others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

pytest.importorskip("greenlet")

from streamchat.server.scheduler import Scheduler


def run(scheduler: Scheduler, *works: Callable[[], None]) -> None:
    """Run tasks up to their end, on this thread."""
    for work in works:
        scheduler.submit(work)
    scheduler.close()
    scheduler.run(lambda: None, 0.01)


def test_tasks_take_turns_after_so_many_steps() -> None:
    scheduler, steps = Scheduler(3, 60.0), ""

    def task(name: str) -> Callable[[], None]:
        def work() -> None:
            nonlocal steps
            for _ in range(7):
                scheduler.pause()
                steps += name

        return work

    run(scheduler, task("a"), task("b"))
    assert steps == "aaabbbaaabbbab"


def test_a_slow_step_ends_the_slice() -> None:
    scheduler, steps = Scheduler(100, 0.01), ""

    def task(name: str) -> Callable[[], None]:
        def work() -> None:
            nonlocal steps
            for _ in range(3):
                scheduler.pause()
                steps += name
                time.sleep(0.02)

        return work

    run(scheduler, task("a"), task("b"))
    assert steps == "ababab"


def test_a_task_alone_never_switches() -> None:
    scheduler, threads = Scheduler(1, 60.0), set()

    def work() -> None:
        for _ in range(1000):
            scheduler.pause()
            threads.add(threading.get_ident())

    run(scheduler, work)
    assert threads == {threading.get_ident()}


def test_those_that_wait_get_it_in_the_order_in_which_they_came() -> None:
    scheduler, got, is_free = Scheduler(), list[int](), True

    def task(number: int) -> Callable[[], None]:
        def work() -> None:
            nonlocal is_free
            scheduler.wait(lambda: is_free)
            is_free = False
            for _ in range(10):
                scheduler.pause()
            got.append(number)
            is_free = True

        return work

    run(scheduler, *map(task, range(20)))
    assert got == list(range(20))


def test_what_another_thread_changes_wakes_a_task_up() -> None:
    scheduler, event = Scheduler(), threading.Event()

    def set_soon() -> None:
        event.set()
        scheduler.wake()

    threading.Timer(0.05, set_soon).start()
    run(scheduler, lambda: scheduler.wait(event.is_set))
    assert event.is_set()


def test_an_error_ends_its_task_only() -> None:
    scheduler, done = Scheduler(), list[int]()

    def fail() -> None:
        raise ValueError("broken")

    run(scheduler, fail, lambda: done.append(1))
    assert done == [1]


def test_a_call_returns_and_raises_what_its_function_does() -> None:
    scheduler = Scheduler()
    thread = threading.Thread(target=scheduler.run, args=(lambda: None, 0.01))
    thread.start()
    try:
        assert scheduler.call(threading.get_ident) == thread.ident
        with pytest.raises(ZeroDivisionError):
            scheduler.call(lambda: 1 // 0)
        assert scheduler.call(lambda: "goes on", 10) == "goes on"
    finally:
        scheduler.close()
        thread.join(10)


def test_idle_is_called_when_nothing_runs() -> None:
    scheduler, calls = Scheduler(), list[float]()

    def idle() -> None:
        calls.append(time.monotonic())
        if len(calls) == 2:
            scheduler.close()

    scheduler.run(idle, 0.01)
    assert len(calls) == 2
