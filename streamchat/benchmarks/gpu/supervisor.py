"""Runs the cases of `bench --gpu` in a process of their own, and starts another one after a case that ended it."""

from __future__ import annotations

import json
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from streamchat.base import child_processes
from streamchat.benchmarks.gpu.cases import Case, Row, Tenth

if TYPE_CHECKING:
    from streamchat.benchmarks.gpu.worker import Job

CASE_LIMIT_S = 100.0
"""Time after which a case is stopped; a compiled static cache may take a minute."""
START_LIMIT_S = 60.0
"""Time for the start of a process, with the bandwidth."""
GRACE_S = 15.0
"""Time after the end of the run for the case that is still measured."""
TENTH_LIMIT_S = 120.0
"""Time for a tenth of a long reply."""


@dataclass
class Results:
    """What was measured so far."""

    rows: list[Row] = field(default_factory=list)
    tenths: list[Tenth] = field(default_factory=list)
    gpu: str = ""
    bandwidth: float | None = None
    """Bytes per second, read and written."""
    flat_model: str = ""
    flat_error: str = ""


class Supervisor:
    """Measures all cases of a job, each result written to a file as it comes.

    Args:
        job: All cases.
        command: Starts a worker.
        file: Gets one JSON object per line.
        progress: Called with the case that is measured.
    """

    def __init__(self, job: Job, command: Sequence[str], file: Path, progress: Callable[[str], None]) -> None:
        self._job, self._command, self._progress = job, command, progress
        self._file = file.open("w", encoding="utf-8")
        self._started = time.monotonic()
        self._has_started = False
        self.results = Results()

    def run(self) -> Results:
        """Measure everything that there is time for; return the results."""
        job, cases = self._job, self._job.cases
        with self._file:
            while (done := len(self.results.rows)) < len(cases) and self._left() > 0:
                self._run_cases(replace(job, cases=cases[done:], first=done, tokens=0, seconds=self._left()))
            for case in cases[len(self.results.rows) :]:
                self._add(Row(case, error=f"skipped: the {job.seconds:g} s of --time-limit were over"))
            if job.tokens:
                self.results.flat_error += self._run_worker(replace(job, cases=[]))
        return self.results

    def _left(self) -> float:
        """Return the seconds until no further case is started."""
        return self._job.seconds - (time.monotonic() - self._started)

    def _run_cases(self, job: Job) -> None:
        """Run one worker for `job`; the case that ended it, if any, gets a row with the reason."""
        self._has_started = False
        reason = self._run_worker(job)
        if reason and len(self.results.rows) < len(self._job.cases):
            # one that ended before its first case would do so again
            cut = slice(len(self.results.rows), len(self.results.rows) + 1 if self._has_started else None)
            for case in self._job.cases[cut]:
                self._add(Row(case, error=reason))

    def _run_worker(self, job: Job) -> str:
        """Run one worker until it ends or takes too long; return why it was stopped or died, '' if it did not."""
        job = replace(job, bandwidth=self.results.bandwidth)
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
            worker = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=child_processes.environment(),
                cwd=child_processes.FOLDER,
            )
            try:
                reason = self._follow(worker, job.as_json())
            finally:
                worker.kill()  # nothing, if it has ended
                code = worker.wait()
                assert worker.stdout is not None
                worker.stdout.close()
            return reason or _death(code, errors)

    def _follow(self, worker: subprocess.Popen[str], job: str) -> str:
        """Take the results of a worker until it ends; return why it was stopped, '' if it ended by itself."""
        assert worker.stdin is not None
        assert worker.stdout is not None
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(worker.stdout, lines), daemon=True).start()
        try:
            worker.stdin.write(job + "\n")
            worker.stdin.close()
        except BrokenPipeError:
            pass  # its exit code and stderr say why
        limit = START_LIMIT_S
        while True:
            try:
                line = lines.get(timeout=limit)
            except queue.Empty:
                return f"stopped after {limit:.0f} s"
            if line is None:
                worker.wait()
                return ""
            limit = self._take(json.loads(line))

    def _take(self, line: dict[str, Any]) -> float:
        """Keep one line of a worker; return the seconds that the next one may take."""
        found = self.results
        if "started" in line:
            self._has_started = True
            self._progress(self._job.cases[line["started"]].name)
            return min(CASE_LIMIT_S, max(1.0, self._left() + GRACE_S))
        if "row" in line:
            case = Case(**line["row"].pop("case"))
            self._add(Row(case=case, **line["row"]))
        elif "tenth" in line:
            found.flat_model = line["model"]
            found.tenths.append(Tenth(**line["tenth"]))
            self._progress(f"{found.tenths[-1].tokens:,} of {self._job.tokens:,} tokens")
            self._write({"tenth": line["tenth"]})
        elif "flat_error" in line:
            found.flat_error = line["flat_error"]
        else:
            found.gpu, found.bandwidth = line["gpu"], line["bandwidth"]
            self._write(line)
        return TENTH_LIMIT_S

    def _add(self, row: Row) -> None:
        self.results.rows.append(row)
        self._write({"row": asdict(row)})

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def _read(lines: IO[str], into: queue.Queue[str | None]) -> None:
    try:
        for line in lines:
            into.put(line)
    except ValueError:  # closed after the worker was stopped
        pass
    into.put(None)


def _death(code: int, errors: IO[str]) -> str:
    """Return how a worker died; '' after an orderly end."""
    from streamchat.benchmarks.gpu.worker import BROKEN

    if code in (0, BROKEN):
        return ""
    errors.seek(0)
    last = next((line.strip() for line in reversed(errors.read().splitlines()) if line.strip()), "")
    return f"the process ended with exit code {code}" + (f": {last[:300]}" if last else "")
