"""`streamchat web`: serve the app to a browser."""

from __future__ import annotations

import argparse

from streamchat.cli import flags
from streamchat.web.launch import HOST, PORT, Served
from streamchat.web.serve import serve

HELP = "serve the app to a browser"
DESCRIPTION = (
    "Serve the app to a browser, through textual-serve. Each tab is a separate chat, which resumes after a reload "
    "of the page. Prints the address to open, with a new token at each start. Ctrl+C saves the chats and stops the "
    "server."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    own = parser.add_argument_group("server")
    own.add_argument("--port", type=int, default=PORT, metavar="PORT", help=f"port to listen on (default: {PORT})")
    own.add_argument(
        "--host", default=HOST, metavar="HOST", help=f"address to bind (default: {HOST}, this machine only)"
    )
    own.add_argument(
        "--url",
        default="",
        metavar="URL",
        help="address that browsers use, if different, such as that of a proxy (https://chat.example.org)",
    )
    own.add_argument(
        "--files",
        action="store_true",
        help="let the browser access files of this machine: @file, /read, /export FILE, /model FOLDER",
    )
    own.add_argument(
        "--resume",
        nargs="?",
        const="last",
        metavar="ID",
        help="resume a saved conversation in the first tab (default: the last one)",
    )
    flags.add_setting_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit code.

    Raises:
        ConfigError: A setting or an argument is wrong, the port cannot be opened, or textual-serve is not installed.
    """
    flags.configuration_of(args)  # report errors here instead of in each tab
    return serve(Served(flags.given_flags(args), args.host, args.port, args.url, args.files, args.resume))
