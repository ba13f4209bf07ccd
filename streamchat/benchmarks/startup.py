"""`streamchat bench --startup`: time from the command to the first paint, the ready model and the first token."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from streamchat.base import child_processes
from streamchat.base.errors import StreamchatError
from streamchat.base.progress import Progress
from streamchat.benchmarks.figures import sample_rounds, spread, summary
from streamchat.benchmarks.loading import SETTINGS, machine
from streamchat.config import loader
from streamchat.config.loader import Configuration
from streamchat.reports.machine import machine_line
from streamchat.reports.page import Page, Table
from streamchat.telemetry import trace

SIZE = (40, 140)
TIMEOUT_S = 300.0
PAINT, READY, TOKEN = "first paint", "model ready", "first token"
QUIT = b"\x11"


STAGES = {
    "python": "an empty Python",
    "--help": "streamchat --help",
    "a wrong flag": "a wrong flag",
    PAINT: "first paint of the app",
    READY: "model ready",
    TOKEN: "first token of a reply to an immediate message",
}


def run(args: argparse.Namespace, configuration: Configuration, progress: Progress) -> Page:
    """Measure startup with the settings of the command line.

    Raises:
        StreamchatError: A start failed or took too long, or this system has no pseudo-terminals.
    """
    given = {name: getattr(args, name, None) for name in SETTINGS}
    arguments = [f"{loader.flag_of(name)}={value}" for name, value in given.items() if value is not None]
    samples = measure(arguments, args.rounds, progress)
    rows = [(STAGES[name], spread(values, 2)) for name, values in samples.items()]
    table = Table("Startup", ("", "seconds"), rows, "Medians over rounds, with minimum and maximum.")
    lines = [f"streamchat {' '.join(arguments)}".rstrip(), machine_line()]
    data = {name: summary(values, "_s") for name, values in samples.items()} | machine()
    return Page("bench-startup", "Startup", lines, [table], data=data)


def measure(arguments: Sequence[str], rounds: int, progress: Callable[[str], None]) -> dict[str, list[float]]:
    """Return the seconds of each stage in each round, after one round to warm up the disk cache.

    Args:
        arguments: Settings for the chat, as on the command line.
        rounds: Number of measured rounds.
        progress: Called with progress messages.

    Raises:
        StreamchatError: A start failed or took too long, or this system has no pseudo-terminals.
    """
    if os.name != "posix":
        raise StreamchatError("--startup needs a pseudo-terminal, which this system does not have")

    def start_all() -> dict[str, float]:
        return {
            "python": _wall(child_processes.python("-c", "pass"), 0),
            "--help": _wall(child_processes.streamchat(["--help"]), 0),
            "a wrong flag": _wall(child_processes.streamchat(["--no-such-flag"]), 2),
            **_app(child_processes.streamchat(arguments)),
        }

    return sample_rounds(start_all, rounds, progress)


def _wall(command: Sequence[str], code: int) -> float:
    started = time.monotonic()
    done = child_processes.run(command, timeout=TIMEOUT_S)
    if done.returncode != code:
        raise StreamchatError(f"{' '.join(command[-2:])} ended with exit code {done.returncode}")
    return time.monotonic() - started


def _app(command: Sequence[str]) -> dict[str, float]:
    """Run the app in a pseudo-terminal, and type a message as soon as the model is ready."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *SIZE, 0, 0))
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "trace")
        extra = {trace.VARIABLE: path, "TERM": "xterm-256color", "STREAMCHAT_SAVE": "never"}
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=child_processes.environment(**extra),
            cwd=child_processes.FOLDER,
            start_new_session=True,
        )
        os.close(theirs)
        try:
            moments = _watch(process, ours, path, started)
        finally:
            _end(process, ours)
    return {name: moments[name] - started for name in (PAINT, READY, TOKEN)}


def _watch(process: subprocess.Popen[bytes], terminal: int, path: str, started: float) -> dict[str, float]:
    import select

    typed = False
    while time.monotonic() - started < TIMEOUT_S:
        if select.select([terminal], [], [], 0.005)[0]:
            with contextlib.suppress(OSError):  # the app closed its end; handled below
                os.read(terminal, 65536)
        moments = trace.read_events(path)
        if READY in moments and not typed:
            typed = True
            os.write(terminal, b"Say hello.\r")
        if TOKEN in moments:
            return moments
        if reason := next((name for name in moments if name.startswith(trace.FAILED)), ""):
            raise StreamchatError(reason.removeprefix(trace.FAILED))
        if process.poll() is not None:
            raise StreamchatError(f"the app ended with exit code {process.returncode} before its first token")
    raise StreamchatError(f"no token was generated within {TIMEOUT_S:.0f} s of the start")


def _end(process: subprocess.Popen[bytes], terminal: int) -> None:
    """Quit the app, and kill it if it does not exit. Its output must be read meanwhile, or it would block."""
    import select

    with contextlib.suppress(OSError):
        os.write(terminal, QUIT)
    deadline = time.monotonic() + 10
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if select.select([terminal], [], [], 0.05)[0]:
                os.read(terminal, 65536)
    if process.poll() is None:
        process.kill()
        process.wait()
    os.close(terminal)
