"""A server in a process of its own, for measuring how long `streamchat attach` takes."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

from streamchat.base import child_processes
from streamchat.base.errors import StreamchatError

_URL = re.compile(r"serving .* at (http://\S+)/v1;")


def can_attach() -> bool:
    """Return whether the optional libraries of server and front ends are installed."""
    return all(find_spec(name) is not None for name in ("greenlet", "starlette", "uvicorn", "websockets"))


@contextmanager
def server(arguments: Sequence[str]) -> Iterator[str]:
    """Run `streamchat serve` with these settings for the length of the block; yield its address.

    Raises:
        StreamchatError: It could not start.
    """
    command = child_processes.streamchat(["serve", "--port=0", "--save=never", *arguments])
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=child_processes.environment(),
        cwd=child_processes.FOLDER,
    ) as process:
        assert process.stderr is not None
        try:
            last = ""
            for line in process.stderr:
                last = line.strip() or last
                if found := _URL.search(line):
                    yield found[1]
                    break
            else:
                raise StreamchatError(f"the server did not start: {last}")
        finally:
            process.terminate()
