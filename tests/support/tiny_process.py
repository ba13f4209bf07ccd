"""`tests.support.tiny_server` as a process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """A port that no program uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(port: int, *settings: str, live: int = 2) -> Iterator[subprocess.Popen[str]]:
    """A server that is ready."""
    command = [sys.executable, "-m", "tests.support.tiny_server", str(port), str(live), *settings]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as started:
        assert started.stderr is not None
        try:
            assert any("ready" in line for line in started.stderr)
            yield started
        finally:
            started.kill()
