"""Other programs that come and go: monitors, readers of the database, and scrapers of the metrics."""

from __future__ import annotations

import random
import socket
import sqlite3
import struct
import subprocess
from contextlib import closing, suppress

from streamchat.base import child_processes
from streamchat.replay.chaos.kind import Outside, Target, Values

REQUEST = b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
WEIGHTS = {"monitor": 1, "killed monitor": 1, "reader": 3, "scraper": 3, "half scraper": 2}
"""Form of a client -> its relative frequency."""


class Clients(Outside):
    """A client that runs for some seconds."""

    name = "clients"
    what = (
        "`streamchat monitor` starts and exits or is killed, another program holds a read transaction on the database, "
        "and a client reads the metrics or resets its connection in the middle of the request"
    )
    every = 8

    def draw(self, rng: random.Random) -> Values:
        [form] = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
        return {"form": form, "seconds": round(rng.uniform(0.02, 1.0), 2)}

    def describe(self, values: Values) -> str:
        return f"{values['form']}, {values['seconds']:.1f} s"

    def slow_for_s(self, values: Values) -> float:
        return 5.0 if "monitor" in values["form"] else float(values["seconds"]) + 0.5

    def disturb(self, target: Target, values: Values) -> None:
        match values["form"]:
            case "reader":
                _read(target, values["seconds"])
            case "scraper":
                _scrape(target, REQUEST, 0.0)
            case "half scraper":
                _scrape(target, REQUEST[:20], values["seconds"])
            case form:
                _monitor(target, values["seconds"] if form.startswith("killed") else 60.0)


def _monitor(target: Target, limit_s: float) -> None:
    command = child_processes.streamchat(["monitor", str(target.folder.absolute()), "--once"])
    quiet = subprocess.DEVNULL
    environment = child_processes.environment()
    with subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, env=environment) as process:
        with suppress(subprocess.TimeoutExpired):
            process.wait(limit_s)
        process.kill()


def _read(target: Target, seconds: float) -> None:
    """Hold a snapshot of the database, so that its write-ahead log cannot be reset."""
    with suppress(sqlite3.Error):  # the run has just created the database
        address = f"{target.database.absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(address, uri=True, isolation_level=None)) as connection:
            connection.execute("BEGIN")
            connection.execute("SELECT count(*) FROM turns").fetchone()
            target.ended.wait(seconds)


def _scrape(target: Target, request: bytes, wait_s: float) -> None:
    """Send a request, and read the answer; with `wait_s`, wait, and reset the connection instead."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", target.metrics_port), 5.0) as connection:
        connection.sendall(request)
        if wait_s:
            target.ended.wait(wait_s)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        while connection.recv(65_536):
            pass
