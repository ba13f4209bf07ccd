"""Runs the measured process, disturbs it when it asks for it, and records what happens from outside."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil

from streamchat.base import child_processes
from streamchat.base.paths import private_opener
from streamchat.replay.chaos.kind import Kind, Outside, Target
from streamchat.replay.chaos.link import messages
from streamchat.replay.chaos.terminal import Pipe, Terminal
from streamchat.replay.run import RunFolder

SAMPLE_S = 0.1
"""Least time between two samples of the process."""
END_S = 60.0
"""Time that the process gets to end after its last message."""
Command = Callable[[Sequence[str]], list[str]]


def log_path(folder: RunFolder) -> Path:
    """Return the file with all messages of a run with chaos, and with the samples of its process."""
    return folder.path / "chaos.jsonl"


class Supervisor:
    """One measured process. Call `run` once; `stop` from any thread.

    Args:
        arguments: Arguments of the process, without those that connect it with this one.
        folder: Folder of the run.
        kinds: The kinds of disturbances to carry out.
        metrics_port: Port of the process's metrics.
        has_app: Whether the process shows the app, on a pseudo-terminal.
        hear: Called with each message of the process.
        command: Returns the command line of a process with the given arguments; replaceable for tests.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        folder: RunFolder,
        kinds: Sequence[Kind],
        metrics_port: int,
        *,
        has_app: bool,
        hear: Callable[[str, Any], None],
        command: Command = child_processes.streamchat,
    ) -> None:
        self._folder, self._hear = folder, hear
        self._kinds = {kind.name: kind for kind in kinds if isinstance(kind, Outside)}
        self._link, theirs = os.pipe()
        line = command([*arguments, "--chaos-link", str(theirs)])
        start = Terminal if has_app else Pipe
        self._output: Terminal | Pipe = start(line, child_processes.environment(), theirs)
        os.close(theirs)
        self.process = self._output.process
        self._observed = psutil.Process(self.process.pid)
        self._ended = threading.Event()
        screen = self._output if isinstance(self._output, Terminal) else None
        self._target = Target(self.process.pid, folder.store, folder.path, metrics_port, screen, self._ended)
        self._threads: list[threading.Thread] = []
        self._sampled_at = 0.0
        self._file = open(log_path(folder), "a", encoding="utf-8", opener=private_opener)  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGCONT)
        for thread in self._threads:
            thread.join(10.0)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._output.close()
        self._file.close()

    @property
    def last_line(self) -> str:
        """The last line that the process printed, once it has ended."""
        return self._output.last_line

    def stop(self) -> None:
        """End the process in order: after the turn, or with the app during it."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)

    def run(self) -> int:
        """Handle all messages until the process ends; return its exit code."""
        for name, value in messages(self._link):
            if name not in ("row", "report"):  # they have files of their own
                self._log(name, value)
            if name == "disturbance":
                self._disturb(value)
            elif name == "turn":
                self._sample(value["index"])
            elif name == "finished" and isinstance(self._output, Terminal):
                self._ended.set()
                self.stop()  # the app waits for the user, who would quit now
            self._hear(name, value)
        self._ended.set()
        try:
            return self.process.wait(END_S)
        except Exception:
            self.process.kill()
            return self.process.wait()

    def _log(self, name: str, value: Any) -> None:
        self._file.write(json.dumps({name: value}) + "\n")
        self._file.flush()

    def _disturb(self, order: dict[str, Any]) -> None:
        kind = self._kinds.get(order["kind"])
        if kind is not None:
            arguments = (self._target, order["values"])
            thread = threading.Thread(target=kind.disturb, args=arguments, name=f"chaos-{kind.name}", daemon=True)
            thread.start()
            self._threads = [each for each in self._threads if each.is_alive()] + [thread]

    def _sample(self, index: int) -> None:
        """Record what the process uses, as the system counts it."""
        if time.monotonic() - self._sampled_at < SAMPLE_S:
            return
        self._sampled_at = time.monotonic()
        with suppress(psutil.Error, OSError):
            with self._observed.oneshot():
                times = self._observed.cpu_times()
                sample = {
                    "index": index,
                    "processor_s": times.user + times.system,
                    "memory": self._observed.memory_info().rss,
                    "descriptors": self._observed.num_fds() if psutil.POSIX else None,
                    "threads": self._observed.num_threads(),
                }
            self._log("sample", sample | {"wal": _size(self._folder.store.with_name(f"{self._folder.store.name}-wal"))})


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
