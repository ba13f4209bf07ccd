"""A connection to a Ray cluster."""

from __future__ import annotations

import io
import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stdout
from importlib.util import find_spec
from typing import Any

from streamchat.base import child_processes
from streamchat.base.errors import ConfigError, reason_of, short

PATIENCE_S = 10.0
"""Time for a head node to accept a connection. Ray would wait for minutes."""


@contextmanager
def connected(address: str, **options: Any) -> Iterator[None]:
    """Context manager: connect to a Ray cluster; end one that was started here.

    What Ray prints on stdout meanwhile, such as errors of tasks that it repeats, goes to the log file.

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

    with redirect_stdout(_LogFile()):
        try:
            # Ray adds the current folder to the search path of its workers; ours is already on it
            with child_processes.safe_environment(), chdir(child_processes.FOLDER.parent):
                ray.init(
                    address=address, include_dashboard=False, log_to_driver=False, logging_level="error", **options
                )
        except Exception as error:
            if address == "auto" and isinstance(error, ConnectionError):
                raise ConfigError(
                    "--ray auto: no Ray cluster runs on this machine; start one with `ray start --head`, give the "
                    "address of a head node, or use --ray local"
                ) from None
            raise ConfigError(f"--ray {address}: the cluster cannot be reached ({short(error, 200)})") from None
        try:
            yield
        finally:
            ray.shutdown()


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
