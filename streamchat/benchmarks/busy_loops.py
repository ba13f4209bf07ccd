"""Processes that keep the cores busy, as other programs do."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from streamchat.base import child_processes

# Prints a line after a while of computing, and ends with the process that started it.
LOOP = """
import os, time
parent = os.getppid()
while time.process_time() < 0.1:
    pass
print("busy", flush=True)
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Run `count` processes that compute without a pause. All of them run when the block begins."""
    command = child_processes.python("-S", "-c", LOOP)
    loops: list[subprocess.Popen[str]] = []
    try:
        for _ in range(count):
            environment, folder = child_processes.environment(), child_processes.FOLDER
            loops.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder))
        for loop in loops:
            assert loop.stdout is not None
            loop.stdout.readline()
        yield
    finally:
        for loop in loops:
            loop.kill()
        for loop in loops:
            loop.communicate()
