"""Start the server of `streamchat web`."""

from __future__ import annotations

import socket
import sys

from streamchat.base import child_processes
from streamchat.base.errors import ConfigError, ExitCode, reason_of
from streamchat.base.host_names import new_socket
from streamchat.web.gate import Gate, checked_url
from streamchat.web.launch import Served


def serve(served: Served) -> int:
    """Serve until Ctrl+C and return the exit code.

    Raises:
        ConfigError: textual-serve is not installed, the host or port cannot be used, or `url` is not a valid address.
    """
    try:
        from streamchat.web.server import WebServer
    except ImportError:
        raise ConfigError("`streamchat web` needs textual-serve; run: pip install 'streamchat[web]'") from None
    if not 1 <= served.port <= 65535:
        raise ConfigError(f"--port {served.port}: the port must be from 1 to 65535")
    gate = Gate(served.host, served.port, checked_url(served.url) if served.url else "")
    _check_port(served.host, served.port)
    for address in gate.addresses():
        print(f"streamchat: {address}/?token={gate.token}", file=sys.stderr)
    print(
        "streamchat: anyone with this address can chat and read the saved sessions; press Ctrl+C to stop",
        file=sys.stderr,
        flush=True,
    )
    with child_processes.safe_environment():
        WebServer(served, gate).serve()
    return ExitCode.OK


def _check_port(host: str, port: int) -> None:
    probe, address = new_socket(host, port)
    with probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise ConfigError(
                f"--port {port}: http://{host}:{port} cannot be opened ({reason_of(error)}); choose another port"
            ) from error
