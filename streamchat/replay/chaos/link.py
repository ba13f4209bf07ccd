"""The pipe on which the measured process reports to its supervisor: JSON objects with one key, one per line."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Link:
    """The end of the measured process. Any thread may send.

    Args:
        descriptor: The end of the pipe to write to.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._lock = descriptor, threading.Lock()
        self._is_broken = False

    def send(self, name: str, value: Any) -> None:
        """Send `value`, a JSON value. Ends this process in order if there is no supervisor any more."""
        data = json.dumps({name: value}).encode() + b"\n"
        with self._lock:
            try:
                while data and not self._is_broken:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:
                self._is_broken = True
                os.kill(os.getpid(), signal.SIGTERM)

    def close(self) -> None:
        """Close the pipe."""
        with self._lock:
            self._is_broken = True
            os.close(self._descriptor)


def messages(descriptor: int) -> Iterator[tuple[str, Any]]:
    """Yield the messages until the other end is closed; close this end."""
    with open(descriptor, "rb") as pipe:
        for line in pipe:
            try:
                [(name, value)] = json.loads(line).items()
            except ValueError:
                return  # the process was killed while it sent
            yield name, value
