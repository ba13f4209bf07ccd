"""Runs the tests of many mutants, a few at a time."""

from __future__ import annotations

import io
import os
import select
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field

import pytest

from tools.mutation.children import PYTEST, Child, Job, Outcome, Reporter
from tools.mutation.mutants import Mutant

Report = Callable[[Mutant, Outcome], None]


@dataclass
class Runner:
    """Finds out which mutants the tests detect.

    A test that fails without a change as well, in a forked process, counts for no mutant.
    """

    tests_of: Callable[[Mutant], Sequence[str]]
    seconds: dict[str, float]
    report: Report
    workers: int = 1
    unreliable: set[str] = field(default_factory=set)
    _reliable: set[str] = field(default_factory=set)

    def run(self, mutants: Sequence[Mutant]) -> None:
        """Run the tests of each mutant, in its order, until one fails."""
        files = sorted({test.split("::")[0] for each in mutants for test in self.tests_of(each)})
        with redirect_stdout(io.StringIO()) as shown, tempfile.TemporaryDirectory(prefix="mutation-") as folder:
            os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = folder
            code = pytest.main([*PYTEST, *files], plugins=[_Collected(self, mutants)])
        if code:
            raise SystemExit(f"pytest cannot collect the tests:\n{shown.getvalue()}")

    def loop(self, mutants: Sequence[Mutant], items: dict[str, pytest.Item]) -> None:
        """Fork a process for each mutant; end them all if this process is interrupted."""
        children = dict[int, Child]()
        try:
            self._loop(deque(mutants), children, items)
        finally:
            for child in children.values():
                child.close()

    def _loop(self, jobs: deque[Mutant], children: dict[int, Child], items: dict[str, pytest.Item]) -> None:
        while jobs or children:
            while jobs and len(children) < self.workers:
                job = self._job(jobs.popleft(), items)
                if job.mutant and not job.tests:
                    self.report(job.mutant, Outcome("survived", ""))
                    continue
                child = Child(job, self.seconds, items)
                children[child.pipe] = child
            for pipe in select.select(list(children), [], [], 1)[0]:
                if not children[pipe].read():
                    jobs.extendleft(self._finish(children.pop(pipe), items))
            for late in [each for each in children.values() if time.monotonic() > each.deadline]:
                jobs.extendleft(self._finish(children.pop(late.pipe), items))

    def _job(self, mutant: Mutant, items: dict[str, pytest.Item]) -> Job:
        tests = [each for each in self.tests_of(mutant) if each in items and each not in self.unreliable]
        return Job(mutant, tuple(tests))

    def _finish(self, child: Child, items: dict[str, pytest.Item]) -> list[Mutant]:
        """Report a mutant, or return it if other tests must run."""
        outcome, mutant = child.close(), child.job.mutant
        assert mutant is not None
        if outcome.test and not self._is_reliable(outcome.test, items):
            return [mutant]
        self.report(mutant, outcome)
        return []

    def _is_reliable(self, test: str, items: dict[str, pytest.Item]) -> bool:
        """Return True if a test passes without a change."""
        if test not in self._reliable | self.unreliable:
            child = Child(Job(None, (test,)), self.seconds, items)
            while time.monotonic() < child.deadline and (not select.select([child.pipe], [], [], 1)[0] or child.read()):
                pass
            (self._reliable if child.close().status == "survived" else self.unreliable).add(test)
        return test in self._reliable


class _Collected:
    """A plugin for pytest that runs the tests in processes of their own."""

    def __init__(self, runner: Runner, mutants: Sequence[Mutant]) -> None:
        self._runner, self._mutants = runner, mutants

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self) -> None:
        """Keep hypothesis from searching for the smallest failure."""
        Reporter(-1).pytest_configure()

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Fork instead of running the tests here."""
        if session.testsfailed:
            raise session.Failed("errors while collecting")
        self._runner.loop(self._mutants, {item.nodeid: item for item in session.items})
        return True
