"""`streamchat bench --startup`: time from the command to first paint, ready model and first token, in parts.

The time of `import torch` depends on the machine and on what else it does, so it is measured in the same rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from streamchat.base import child_processes
from streamchat.base.errors import StreamchatError
from streamchat.base.progress import Progress
from streamchat.benchmarks.attaching import can_attach, server
from streamchat.benchmarks.figures import sample_rounds, spread, summary
from streamchat.benchmarks.loading import SETTINGS, machine
from streamchat.config import loader
from streamchat.config.loader import Configuration
from streamchat.reports.machine import machine_line
from streamchat.reports.page import Page, Table
from streamchat.telemetry import trace

SIZE = (40, 140)
TIMEOUT_S = 300.0
PAINT, READY, TOKEN = trace.PAINT, trace.READY, trace.TOKEN
QUIT = b"\x11"
IMPORT_TORCH, PIPE = "import torch", "first token in a pipe"
ATTACHED_PAINT, ATTACHED_TOKEN, ATTACHED = "attached: paint", "attached: token", "attached: paint to token"

STAGES = {
    "python": "an empty Python",
    "--help": "streamchat --help",
    "a wrong flag": "a wrong flag",
    IMPORT_TORCH: "python -c 'import torch'",
    PAINT: "first paint of the app",
    READY: "model ready",
    TOKEN: "first token of a reply to an immediate message",
    PIPE: "first token of a reply in a pipe",
    ATTACHED_PAINT: "streamchat attach: first paint of the app",
    ATTACHED_TOKEN: "streamchat attach: first token of a reply to an immediate message",
    ATTACHED: "streamchat attach: from first paint to first token",
}
PARTS = {
    PAINT: "Python, the app's own imports, first paint",
    trace.TORCH: "import torch",
    trace.TRANSFORMERS: "import transformers and the code of the model",
    trace.MODULES: "other imports",
    trace.TOKENIZER: "tokenizer",
    trace.WEIGHTS: "weights",
    trace.CHECKS: "kernels, quantized weights, checks",
    READY: "positions, chat format, system block; ready",
    trace.PREFILLED: "prefill of the first prompt, from the key press",
    TOKEN: "first token",
}
"""Trace event -> what has happened since the event before it."""


def run(args: argparse.Namespace, configuration: Configuration, progress: Progress) -> Page:
    """Measure startup with the settings of the command line.

    Raises:
        StreamchatError: A start failed or took too long, or this system has no pseudo-terminals.
    """
    given = {name: getattr(args, name, None) for name in SETTINGS}
    arguments = [f"{loader.flag_of(name)}={value}" for name, value in given.items() if value is not None]
    samples = measure(arguments, args.rounds, progress)
    stages = [name for name in STAGES if name in samples]
    rows = [(STAGES[name], spread(samples[name], 2), spread(_ratios(samples, name), 2)) for name in stages]
    note = "Medians over rounds, with minimum and maximum. Ratios are those of one round."
    if sys.dont_write_bytecode:
        note += (
            " PYTHONDONTWRITEBYTECODE is set: if streamchat's modules were never compiled, each start compiles them."
        )
    parts = [(words, spread(samples[_part(name)], 3)) for name, words in PARTS.items()]
    tables = [
        Table("Startup", ("", "seconds", "/ import torch"), rows, note),
        Table("Parts of a start of the app", ("", "seconds"), parts, "Each from the end of the one before it."),
    ]
    lines = [f"streamchat {' '.join(arguments)}".rstrip(), machine_line()]
    data = {name: summary(values, "_s") for name, values in samples.items()} | machine()
    data |= {f"{name} / {IMPORT_TORCH}": summary(_ratios(samples, name), "") for name in (PAINT, TOKEN, PIPE)}
    return Page("bench-startup", "Startup", lines, tables, data=data)


def _part(event: str) -> str:
    """Return the name of the figure of the part that ends with `event`."""
    return f"part: {event}"


def _ratios(samples: Mapping[str, Sequence[float]], name: str) -> list[float]:
    return [value / torch for value, torch in zip(samples[name], samples[IMPORT_TORCH], strict=True)]


def measure(arguments: Sequence[str], rounds: int, progress: Callable[[str], None]) -> dict[str, list[float]]:
    """Return the seconds of each stage and each part in each round, after one round to warm up the disk cache.

    Args:
        arguments: Settings for the chat, as on the command line.
        rounds: Number of measured rounds.
        progress: Called with progress messages.

    Raises:
        StreamchatError: A start failed or took too long, or this system has no pseudo-terminals.
    """
    if os.name != "posix":
        raise StreamchatError("--startup needs a pseudo-terminal, which this system does not have")

    def start_all(url: str) -> dict[str, float]:
        return {
            "python": _wall(child_processes.python("-c", "pass"), 0),
            "--help": _wall(child_processes.streamchat(["--help"]), 0),
            "a wrong flag": _wall(child_processes.streamchat(["--no-such-flag"]), 2),
            IMPORT_TORCH: _wall(child_processes.python("-c", "import torch"), 0),
            **_app(child_processes.streamchat(arguments)),
            PIPE: _pipe(child_processes.streamchat([*arguments, "--max-new-tokens=1"])),
            **(_attached(child_processes.streamchat(["attach", url, "--new"])) if url else {}),
        }

    with server(arguments) if can_attach() else nullcontext("") as url:
        return sample_rounds(lambda: start_all(url), rounds, progress)


def _attached(command: Sequence[str]) -> dict[str, float]:
    """Run an attached app in a pseudo-terminal; return the seconds of its stages."""
    started, moments = _moments(command)
    paint, token = moments[PAINT], moments[TOKEN]
    return {ATTACHED_PAINT: paint - started, ATTACHED_TOKEN: token - started, ATTACHED: token - paint}


def _pipe(command: Sequence[str]) -> float:
    """Run a chat in a pipe with a waiting message; return the seconds to its first token."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "trace")
        extra = {trace.VARIABLE: path, "STREAMCHAT_SAVE": "never"}
        started = time.monotonic()
        done = subprocess.run(
            command,
            input=b"Say hello.\n",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=child_processes.environment(**extra),
            cwd=child_processes.FOLDER,
            timeout=TIMEOUT_S,
            check=False,
        )
        moments = trace.read_events(path)
    if TOKEN not in moments:
        raise StreamchatError(f"the chat ended with exit code {done.returncode} before its first token")
    return moments[TOKEN] - started


def _wall(command: Sequence[str], code: int) -> float:
    started = time.monotonic()
    done = child_processes.run(command, timeout=TIMEOUT_S)
    if done.returncode != code:
        raise StreamchatError(f"{' '.join(command[-2:])} ended with exit code {done.returncode}")
    return time.monotonic() - started


def _app(command: Sequence[str]) -> dict[str, float]:
    """Run the app in a pseudo-terminal; return the seconds of its stages and parts."""
    started, moments = _moments(command)
    seconds = {name: moments[name] - started for name in (PAINT, READY, TOKEN)}
    before = [started, *(moments[name] for name in PARTS)]
    return seconds | {_part(name): moments[name] - earlier for name, earlier in zip(PARTS, before, strict=False)}


def _moments(command: Sequence[str]) -> tuple[float, dict[str, float]]:
    """Run the app in a pseudo-terminal, and type a message as soon as the model is ready.

    Returns:
        When it was started, and the times of its trace events.
    """
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
            return started, _watch(process, ours, path, started)
        finally:
            _end(process, ours)


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
