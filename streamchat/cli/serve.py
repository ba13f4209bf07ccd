"""`streamchat --serve`: the app in a browser, through textual-serve. Each tab is a separate process."""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

from streamchat.base import child_processes
from streamchat.base.errors import ConfigError, ExitCode, reason_of

HOST = "127.0.0.1"
"""This machine only by default: whoever opens the page can use the model and read the chats."""
PORT = 8000
WEB_DRIVER = "web_driver"
"""Part of TEXTUAL_DRIVER if textual-serve started this process."""
FILES_REFUSED = (
    "in the browser: it would access files of the machine that streamchat runs on; start streamchat with --serve-files "
    "to allow it"
)


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the server, which its tabs do not get."""
    parser.add_argument(
        "--serve",
        nargs="?",
        const=PORT,
        type=int,
        metavar="PORT",
        help=f"serve the app to a browser at http://{HOST}:PORT (default: {PORT}); needs textual-serve",
    )
    parser.add_argument(
        "--serve-host", default=HOST, metavar="HOST", help=f"address to bind (default: {HOST}, this machine only)"
    )
    parser.add_argument(
        "--serve-url",
        default="",
        metavar="URL",
        help="address that browsers use, if different: a host name or a proxy (https://chat.example.org)",
    )


def serve(argv: Sequence[str], host: str, port: int, url: str = "") -> int:
    """Serve until Ctrl+C and return the exit code.

    Args:
        argv: Arguments of the `streamchat` process of each tab.
        host: Address to bind.
        port: 1 to 65535.
        url: The address that browsers use, if different.

    Raises:
        ConfigError: textual-serve is not installed, the port cannot be opened, or `url` is not a valid address.
    """
    from streamchat.cli.serve_gate import Gate, checked_url

    try:
        from streamchat.cli.serve_server import GuardedServer
    except ImportError:
        raise ConfigError("--serve needs textual-serve; install it with: pip install textual-serve") from None
    if not 1 <= port <= 65535:
        raise ConfigError(f"--serve {port}: the port must be from 1 to 65535")
    gate = Gate(host, port, checked_url(url) if url else "")
    _check_port(host, port)
    for address in gate.addresses():
        print(f"streamchat: {address}/?token={gate.token}", file=sys.stderr)
    print("streamchat: anyone with this address can use it; press Ctrl+C to stop", file=sys.stderr, flush=True)
    with child_processes.safe_environment():
        GuardedServer(tab_command(argv), gate).serve()
    return ExitCode.OK


def tab_command(argv: Sequence[str]) -> str:
    """Return the shell command of a tab: it starts in our own folder, then changes to the current one."""
    command = child_processes.streamchat(argv)
    if os.name == "nt":
        return subprocess.list2cmdline(command)
    return f"cd {shlex.quote(str(child_processes.FOLDER))} && exec {shlex.join(command)}"


def in_browser(environ: Mapping[str, str]) -> bool:
    """Whether this process is a browser tab."""
    return WEB_DRIVER in environ.get("TEXTUAL_DRIVER", "")


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"--serve {port}: http://{host}:{port} cannot be opened ({reason_of(error)}); choose another port"
            ) from error


def refuse_without_serve(host: str, url: str, *, files: bool) -> None:
    """Raise ConfigError if a flag of the server is given without `--serve`."""
    for flag, is_given in (("host", host != HOST), ("url", bool(url)), ("files", files)):
        if is_given:
            raise ConfigError(f"--serve-{flag} has no effect without --serve; add --serve or remove it")


def without_serve(argv: Sequence[str]) -> list[str]:
    """Return the arguments without those of the server; `--serve-files` is kept for the tabs."""
    server = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_server_flags(server)
    return server.parse_known_args(argv)[1]
