"""Records which test executes which lines, and its CPU time: a plugin for pytest.

`python -m tools.mutation` runs pytest with `-p tools.mutation.trace`. It needs the package coverage.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import coverage
import pytest

ROOT = Path(__file__).parents[2]
WRITE_TO, SOURCES = "MUTATION_TRACE", "MUTATION_SOURCES"
"""Environment variables: the file to write, and the folders to trace, separated by colons."""


class Trace:
    """Traces the lines of each test, by its id, and measures the CPU time of setup, call, and teardown in seconds."""

    def __init__(self, path: Path, sources: list[str]) -> None:
        self.path = path
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()
        self.coverage = coverage.Coverage(data_file=None, source=sources, messages=False)
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Attribute the lines that run from here on to one test."""
        self.coverage.switch_context(item.nodeid)
        before = time.process_time()  # a busy machine does not change it
        yield
        self.seconds[item.nodeid] = time.process_time() - before
        self.coverage.switch_context("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the tests that fail or are skipped."""
        if not report.passed:  # it can detect no mutant
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        """Write the trace as JSON."""
        self.coverage.stop()
        data, lines = self.coverage.get_data(), dict[str, dict[int, list[str]]]()
        for name in data.measured_files():
            by_line = data.contexts_by_lineno(name)
            found = {line: sorted({*tests} - {""} - self.failed) for line, tests in sorted(by_line.items())}
            lines[str(Path(name).relative_to(ROOT))] = {line: tests for line, tests in found.items() if tests}
        seconds = {test: round(spent, 4) for test, spent in self.seconds.items() if test not in self.failed}
        self.path.write_text(json.dumps({"seconds": seconds, "lines": lines}))


def pytest_configure(config: pytest.Config) -> None:
    """Start to trace."""
    sources = os.environ[SOURCES].split(":")
    config.pluginmanager.register(Trace(Path(os.environ[WRITE_TO]), [str(ROOT / each) for each in sources]))
