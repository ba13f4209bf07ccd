"""Runs tests on one mutant in a forked process, in which all libraries are imported already."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tools.mutation.change import change_functions, change_imports, forget_modules
from tools.mutation.mutants import ROOT, Mutant

PYTEST = ["-q", "-s", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
SLACK_S, SLACK_FACTOR = 60, 30
"""A test has timed out after so many seconds, and so many times its CPU time without the change."""
ADDRESS_SPACE_B = 8 << 30
"""The tests need about 1 GiB. A change can make a loop allocate without end."""


@dataclass(frozen=True)
class Job:
    """Tests to run in this order until one fails, with or without a change."""

    mutant: Mutant | None
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """Status is `survived`, `failed`, `crashed`, `timeout`, or `error` if no test was started.

    `test` is the one that ended the job, or empty.
    """

    status: str
    test: str


class Reporter:
    """A plugin for pytest that writes to a pipe which test runs and which one fails."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        self.has_failed = False

    def pytest_configure(self) -> None:
        """Let hypothesis report the first failure instead of searching for a smaller one, and store none."""
        from hypothesis import Phase, settings

        short = settings.get_profile("short")
        phases = (Phase.explicit, Phase.generate)
        settings.register_profile("mutation", parent=short, phases=phases, database=None)
        settings.load_profile("mutation")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Write the id of the test that starts."""
        self._write(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write that a test failed."""
        if report.failed and not self.has_failed:
            self.has_failed = True
            self._write("failed")

    def finish(self) -> None:
        """Write that no test failed."""
        if not self.has_failed:
            self._write("survived")

    def _write(self, line: str) -> None:
        os.write(self._pipe, line.encode() + b"\n")


class Child:
    """A forked process that works on a job."""

    def __init__(self, job: Job, seconds: dict[str, float], items: dict[str, pytest.Item]) -> None:
        self.job = job
        self._seconds = seconds
        self._text, self._tests_started = b"", 0
        self._folder = Path(tempfile.mkdtemp(prefix="mutant-"))
        self.pipe, write = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self.pipe)
            _run_and_exit(job, items, write, self._folder)
        os.close(write)
        self.deadline = time.monotonic() + 2 * SLACK_S  # until the first test starts

    def read(self) -> bool:
        """Read what the child wrote; return False at its end."""
        read = os.read(self.pipe, 65536)
        self._text += read
        lines = self._text.decode(errors="replace").split("\n")[:-1]
        tests = [line for line in lines if line not in ("failed", "survived")]
        if len(tests) > self._tests_started:
            self._tests_started = len(tests)
            self.deadline = time.monotonic() + SLACK_S + SLACK_FACTOR * self._seconds.get(tests[-1], 10)
        return bool(read) and not {"failed", "survived"} & set(lines)

    def close(self) -> Outcome:
        """End the child and what it started; return what came of the job."""
        lines = self._text.decode(errors="replace").split("\n")[:-1]
        status = next((line for line in lines if line in ("failed", "survived")), "")
        if not status:
            status = "timeout" if time.monotonic() > self.deadline else "crashed"
            if not self._tests_started:
                status = "error"
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.pipe)
        shutil.rmtree(self._folder, ignore_errors=True)
        tests = [line for line in lines if line not in ("failed", "survived")]
        return Outcome(status, "" if status == "survived" or not tests else tests[-1])


def _run_and_exit(job: Job, items: dict[str, pytest.Item], pipe: int, folder: Path) -> None:
    """Run the tests of a job in this process and end it."""
    status = 1
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_B, ADDRESS_SPACE_B))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        log = os.environ.get("MUTATION_LOG", os.devnull)
        for target, name in enumerate((os.devnull, log, log)):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND), target)
        sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(folder)
        os.chdir(ROOT)
        if job.mutant:
            change_imports(job.mutant)
        reporter = Reporter(pipe)
        if all(test in items for test in job.tests) and (job.mutant is None or change_functions(job.mutant)):
            _run_items([items[test] for test in job.tests], reporter)
        else:
            forget_modules()
            reporter.has_failed = pytest.main([*PYTEST, "-x", *job.tests], plugins=[reporter]) != 0
            if reporter.has_failed:
                os.write(pipe, b"failed\n")
        reporter.finish()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _run_items(items: Sequence[pytest.Item], reporter: Reporter) -> None:
    manager: Any = items[0].config.pluginmanager
    manager.register(reporter)
    for item, following in zip(items, [*items[1:], None], strict=True):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if reporter.has_failed:
            return
