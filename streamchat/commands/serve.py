"""`streamchat --serve`: the app in a browser, through textual-serve. Every tab is a process of its own."""

from __future__ import annotations

import shlex
import socket
import sys
from collections.abc import Sequence

from streamchat.errors import ConfigError, ExitCode

HOST = "127.0.0.1"
"""This machine only, unless told otherwise: who opens the page talks to the model and reads the chats."""
PORT = 8000
WEB_DRIVER = "web_driver"
"""In TEXTUAL_DRIVER where textual-serve has started this process."""


def serve(argv: Sequence[str], host: str, port: int) -> int:
    """Serve until Ctrl+C; returns the exit code.

    Args:
        argv: Arguments of each tab's `streamchat`.
        host: Where to listen.
        port: 1 to 65535.

    Raises:
        ConfigError: textual-serve is not installed, or the port cannot be had.
    """
    try:
        from textual_serve.server import Server
    except ImportError:
        raise ConfigError("--serve needs textual-serve; install it with: pip install textual-serve") from None
    if not 1 <= port <= 65535:
        raise ConfigError(f"--serve {port}: a port from 1 to 65535 is wanted")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"--serve {port}: http://{host}:{port} cannot be served ({error.strerror}); take another port"
            ) from error
    command = shlex.join([sys.executable, "-m", "streamchat", *argv])
    print(f"streamchat: http://{host}:{port} (Ctrl+C ends it)", file=sys.stderr, flush=True)
    Server(command, host=host, port=port, title="streamchat").serve()
    return ExitCode.OK


def without_serve(argv: Sequence[str]) -> list[str]:
    """The arguments without those of serving."""
    out: list[str] = []
    skip = False
    for i, word in enumerate(argv):
        if skip:
            skip = False
        elif word in ("--serve", "--serve-host"):
            following = argv[i + 1] if i + 1 < len(argv) else ""
            skip = word == "--serve-host" or following.isdecimal()
        elif not word.startswith(("--serve=", "--serve-host=")):
            out.append(word)
    return out
