"""`streamchat bench --memory`: peak memory of a chat in its own process, and of llama.cpp with the same file."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import psutil

from streamchat.base import child_processes
from streamchat.base.errors import StreamchatError
from streamchat.base.formatting import plural
from streamchat.base.progress import Progress
from streamchat.benchmarks.figures import sample_rounds, spread, summary
from streamchat.benchmarks.loading import SETTINGS, machine
from streamchat.config import loader
from streamchat.config.loader import Configuration
from streamchat.models.bundled.default import default_gguf
from streamchat.reports.machine import machine_line
from streamchat.reports.page import Page, Table

TIMEOUT_S = 900.0
POLL_S = 0.01
MESSAGES = b"Tell me about rivers.\nAnd about mountains.\n"
CONTEXT = 2048
"""Tokens of llama.cpp's context, if no budget is set."""
TORCH, CHAT, LLAMA = "import torch", "a chat in a pipe", "llama.cpp"
LLAMA_CHAT = """
import sys, llama_cpp
model = llama_cpp.Llama(model_path=sys.argv[1], n_ctx=int(sys.argv[2]), verbose=False)
for text in ("Tell me about rivers.", " And about mountains."):
    model.create_completion(text, max_tokens=int(sys.argv[3]))
"""


def run(args: argparse.Namespace, configuration: Configuration, progress: Progress) -> Page:
    """Measure with the settings of the command line, after one round that may fetch or convert the model.

    Raises:
        StreamchatError: A process failed, or took too long.
    """
    given = {name: getattr(args, name, None) for name in SETTINGS}
    arguments = [f"{loader.flag_of(name)}={value}" for name, value in given.items() if value is not None]
    chat = [*arguments, f"--max-new-tokens={args.new_tokens}"]
    gguf = _gguf(configuration)
    notes = []

    def measure_all() -> dict[str, float]:
        found = {
            TORCH: peak_megabytes(child_processes.python("-c", "import torch")),
            CHAT: peak_megabytes(child_processes.streamchat(chat), MESSAGES),
        }
        path = gguf if gguf.is_file() else None  # the default model's may have been fetched in the first round
        if path is not None and find_spec("llama_cpp") is not None:
            size = configuration.settings.cache_size
            length = str(size if isinstance(size, int) else CONTEXT)
            command = child_processes.python("-c", LLAMA_CHAT, str(path), length, str(args.new_tokens))
            found[LLAMA] = peak_megabytes(command)
        return found

    samples = sample_rounds(measure_all, args.rounds, progress)
    if LLAMA in samples:
        notes.append(f"llama.cpp: llama-cpp-python {version('llama-cpp-python')}, {gguf.name}")
    else:
        notes.append("llama.cpp was skipped: it needs llama-cpp-python and a model in a GGUF file.")
    table = Table(
        "Peak memory",
        ("", "MB"),
        [(name, spread(values, 0)) for name, values in samples.items()],
        f"Largest resident memory of a process, mapped files included: two messages, replies of up to "
        f"{plural(args.new_tokens, 'token')}. Medians over rounds, with minimum and maximum.",
    )
    lines = [f"streamchat {' '.join(arguments)}".rstrip(), machine_line()]
    data = {name: summary(values, "_mb") for name, values in samples.items()} | machine()
    return Page("bench-memory", "Memory", lines, [table], notes=notes, data=data)


def peak_megabytes(command: Sequence[str], given: bytes = b"") -> float:
    """Return the peak resident memory of a process that reads `given`, in MB (10 ** 6 bytes).

    Raises:
        StreamchatError: It failed, or took too long.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=child_processes.environment(STREAMCHAT_SAVE="never"),
            cwd=child_processes.FOLDER,
        )
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin as pipe:  # broken: it failed, and said why
                pipe.write(given)
            peak = _watch(process)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        if process.returncode:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines()
            why = said[-1].removeprefix("streamchat: ") if said else " ".join(command[-2:])[-80:]
            raise StreamchatError(f"a measured process failed (exit code {process.returncode}): {why}")
    return peak / 1e6


def _watch(process: subprocess.Popen[bytes]) -> int:
    """Return the largest resident memory until the process ends, in bytes."""
    peak, deadline = 0, time.monotonic() + TIMEOUT_S
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise StreamchatError(f"a process took longer than {TIMEOUT_S:.0f} s")
        peak = max(peak, _resident(process.pid))
        time.sleep(POLL_S)
    return peak


def _resident(process_id: int) -> int:
    """Return the peak so far where the system keeps it, else the current resident memory; 0 if the process ended."""
    status = Path(f"/proc/{process_id}/status")
    if os.path.exists(status):
        try:
            lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        except OSError:
            return 0
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
    try:
        return int(psutil.Process(process_id).memory_info().rss)
    except psutil.Error:
        return 0


def _gguf(configuration: Configuration) -> Path:
    """Return the GGUF file of the model, which may not exist."""
    name = configuration.settings.model
    return default_gguf() if name == "default" else Path(name).absolute()
