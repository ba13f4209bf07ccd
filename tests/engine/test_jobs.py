"""The queue of the engine: what is busy, and what a stop or the end cancels."""

from __future__ import annotations

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
