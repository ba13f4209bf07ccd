"""The queue of the engine: what is busy, and what a stop or the end cancels."""

from __future__ import annotations

import threading

from streamchat.base.requests import Clear, Compact, Stop, Submit
from streamchat.engine.jobs import Job, JobQueue


def job_of(jobs: JobQueue) -> Job:
    job = jobs.get(0)
    assert job is not None
    return job


def test_only_turns_are_busy_and_all_come_in_order() -> None:
    jobs = JobQueue()
    jobs.put(Clear())
    seen = [(jobs.busy, jobs.running)]
    jobs.put(Submit("one"))
    jobs.put(Compact())
    seen.append((jobs.busy, jobs.running))
    clear, first, second = job_of(jobs), job_of(jobs), job_of(jobs)
    assert [job.request for job in (clear, first, second)] == [Clear(), Submit("one"), Compact()]
    assert jobs.get(0) is None
    first.running = True
    seen.append((jobs.busy, jobs.running))
    jobs.finish(first)
    seen.append((jobs.busy, jobs.running))
    jobs.finish(second)
    seen.append((jobs.busy, jobs.running))
    assert seen == [(False, False), (True, False), (True, True), (True, False), (False, False)]


def test_a_stop_overtakes_the_queue_and_cancels_one_turn() -> None:
    jobs = JobQueue()
    jobs.put(Stop())  # nothing to stop
    jobs.put(Clear())
    jobs.put(Submit("one"))
    jobs.put(Submit("two"))
    jobs.put(Stop())
    jobs.put(Stop())  # the same one
    _, first, second = job_of(jobs), job_of(jobs), job_of(jobs)
    assert (first.cancelled.is_set(), second.cancelled.is_set()) == (True, False)
    assert jobs.get(0) is None  # no job for the stop itself
    jobs.finish(first)
    jobs.put(Stop())
    assert second.cancelled.is_set()


def test_closing_cancels_all_turns_and_wakes_the_thread() -> None:
    jobs = JobQueue()
    jobs.put(Submit("one"))
    jobs.put(Submit("two"))
    first, second = job_of(jobs), job_of(jobs)
    jobs.close()
    assert jobs.closed
    assert first.cancelled.is_set()
    assert second.cancelled.is_set()
    assert jobs.get(60) is None


def test_what_is_sent_after_the_end_is_dropped() -> None:
    jobs = JobQueue()
    jobs.close()
    for request in (Submit("late"), Clear(), Stop()):
        jobs.put(request)
    assert not jobs.busy
    assert jobs.get(0) is None  # wakes the thread
    assert jobs.get(0) is None


def test_a_stop_cancels_the_turn_that_runs_first_whichever_thread_sent_it() -> None:
    jobs = JobQueue()
    entered, go_on = threading.Event(), threading.Event()
    put = jobs._queue.put

    def slow_put(job: Job | None) -> None:
        if not entered.is_set():
            entered.set()
            go_on.wait(10)
        put(job)

    class Slow:
        get = staticmethod(jobs._queue.get)
        put = staticmethod(slow_put)

    jobs._queue = Slow()  # type: ignore[assignment]
    threads = [threading.Thread(target=jobs.put, args=(Submit(text),)) for text in ("one", "two")]
    threads[0].start()
    assert entered.wait(10)  # listed, but not yet queued
    threads[1].start()
    threads[1].join(0.2)
    go_on.set()
    for thread in threads:
        thread.join(10)
    jobs.put(Stop())
    first, second = job_of(jobs), job_of(jobs)
    assert (first.cancelled.is_set(), second.cancelled.is_set()) == (True, False)
