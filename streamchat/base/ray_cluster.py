"""A connection to a Ray cluster."""

from __future__ import annotations

import atexit
import io
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import chdir, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar

from streamchat.base import child_processes
from streamchat.base.errors import ConfigError, ExitCode, StreamchatError, reason_of, short
from streamchat.base.signals import on_signals

Result = TypeVar("Result")
PATIENCE_S = 10.0
"""Time for a head node to accept a connection. Ray would wait for minutes."""
OBJECT_STORE_BYTES = 128_000_000
"""Size of the object store of a cluster that is started here: no large objects are passed. Ray's own is 30 % of RAM."""
CHECK_S = 2.0
"""Time between two checks of the head node."""


class ClusterLostError(StreamchatError):
    """The head node of the cluster no longer answers."""

    title = "Ray cluster"


@dataclass(frozen=True)
class Cluster:
    """A cluster that this process is connected to."""

    address: str
    """HOST:PORT of its head node."""

    @property
    def answers(self) -> bool:
        """Whether the head node answers now."""
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), PATIENCE_S).close()
        except OSError:
            return False
        return True

    def check(self) -> None:
        """Check that the head node answers. Ray would wait for a minute, and then end this process.

        Raises:
            ClusterLostError: It has not answered for `PATIENCE_S` seconds.
        """
        started = time.monotonic()
        while not self.answers:
            if time.monotonic() - started > PATIENCE_S:
                raise ClusterLostError(f"the Ray cluster at {self.address} no longer answers; start it again")
            time.sleep(CHECK_S / 4)

    def call(self, action: Callable[[], Result]) -> Result:
        """Return what `action` returns, which another thread calls. Ctrl+C does not wait for it.

        Raises:
            ClusterLostError: The head node no longer answers.
        """
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(action())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True, name="streamchat-ray").start()
        while not wait([future], CHECK_S).done:
            self.check()
        return future.result()


@contextmanager
def connected(address: str, **options: Any) -> Iterator[Cluster]:
    """Context manager: connect to a Ray cluster; end one that was started here.

    What Ray prints on stdout meanwhile, such as errors of tasks that it repeats, goes to the log file. If the cluster
    is lost, Ray cannot end its threads, and this process ends with exit code 1.

    Args:
        address: 'auto' for the running cluster, 'local' for a new one on this machine, or HOST:PORT of a head node.
        options: More options of `ray.init`.

    Raises:
        ConfigError: Ray is not installed, or the cluster cannot be reached.
    """
    if find_spec("ray") is None:
        raise ConfigError("--ray needs Ray; run: pip install ray")
    _check_address(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage reports from Ray
    import ray

    if address == "local":
        options = {"object_store_memory": OBJECT_STORE_BYTES} | options
    is_lost = threading.Event()
    end = atexit.register(lambda: _end_process() if is_lost.is_set() else None)  # after what Ray registers below
    with redirect_stdout(_LogFile()):
        try:
            # Ray adds the current folder to the search path of its workers; ours is already on it
            with child_processes.safe_environment(), chdir(child_processes.FOLDER.parent), quiet():
                ray.init(
                    address=address, include_dashboard=False, log_to_driver=False, logging_level="error", **options
                )
        except SystemExit:  # Ray handles SIGTERM, with an exit code of its own
            raise SystemExit(ExitCode.TERMINATED) from None
        except Exception as error:
            if address == "auto" and isinstance(error, ConnectionError):
                raise ConfigError(
                    "--ray auto: no Ray cluster runs on this machine; start one with `ray start --head`, give the "
                    "address of a head node, or use --ray local"
                ) from None
            raise ConfigError(f"--ray {address}: the cluster cannot be reached ({short(error, 200)})") from None
        cluster = Cluster(_head_of(address))
        try:
            with on_signals((signal.SIGTERM,), _terminate):
                yield cluster
        finally:
            if cluster.answers:
                ray.shutdown()
                atexit.unregister(end)
            else:
                is_lost.set()
                atexit.unregister(ray.shutdown)  # it would wait for the head node


@contextmanager
def quiet() -> Iterator[None]:
    """Context manager: drop what Ray's C++ code writes to stderr, such as each attempt to reach a head node."""
    sys.stderr.flush()
    before, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(null)


def _terminate(number: int) -> None:
    raise SystemExit(ExitCode.TERMINATED)


def _head_of(address: str) -> str:
    """Return HOST:PORT of the head node, or of its server for clients with ray://."""
    import ray

    if address.startswith("ray://"):
        return address.removeprefix("ray://")
    return str(ray.get_runtime_context().gcs_address)


def _end_process() -> None:
    """End this process at once: at a normal end, Ray's threads would crash it."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(ExitCode.FAILURE)


def _check_address(address: str) -> None:
    """Check that an address is one, and that a head node answers there."""
    if address in ("auto", "local"):
        return
    found = re.fullmatch(r"(?:ray://)?(\[[0-9a-f:.]+\]|[\w.-]+):([0-9]{1,5})", address, re.ASCII | re.IGNORECASE)
    if found is None or not 0 < int(found[2]) < 65536:
        raise ConfigError(f"--ray {address!r} is neither 'auto', 'local', nor HOST:PORT of a head node")
    try:
        socket.create_connection((found[1].strip("[]"), int(found[2])), PATIENCE_S).close()
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"--ray {address}: no cluster answers there ({reason_of(error)}); check the address of the head node"
        ) from None


class _LogFile(io.TextIOBase):
    """Writes to the log file what is printed."""

    def write(self, text: str) -> int:
        if text.strip():
            logging.getLogger("streamchat").info("Ray: %s", text.strip())
        return len(text)
