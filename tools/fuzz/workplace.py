"""An empty folder to run targets in, so that no input reads or writes the user's files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def workplace() -> Iterator[Path]:
    """Context manager: make the working directory, the home folder, and streamchat's folder new and empty."""
    before, environ = Path.cwd(), dict(os.environ)
    shared_memory = Path("/dev/shm")
    where = shared_memory if os.access(shared_memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="streamchat-fuzz-", dir=where) as name:
        for variable in [each for each in os.environ if each.startswith(("STREAMCHAT_", "HF_", "TRANSFORMERS_"))]:
            del os.environ[variable]
        home = str(Path(name, "home"))
        os.environ.update(HOME=home, STREAMCHAT_HOME=f"{home}/streamchat", HF_HOME=f"{home}/huggingface")
        os.mkdir(home)
        os.chdir(name)
        try:
            yield Path(name)
        finally:
            os.chdir(before)
            os.environ.clear()
            os.environ.update(environ)
