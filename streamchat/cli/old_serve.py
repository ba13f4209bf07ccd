"""The flags that `streamchat web` had before it was a command; removed in the next release."""

from __future__ import annotations

import argparse
import sys

from streamchat.base.errors import ConfigError
from streamchat.cli import flags
from streamchat.web.launch import HOST, PORT, Served


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags, which the help does not show."""
    add, hidden = parser.add_argument, argparse.SUPPRESS
    add("--serve", nargs="?", const=PORT, type=int, metavar="PORT", help=hidden)
    add("--serve-host", default=HOST, metavar="HOST", help=hidden)
    add("--serve-url", default="", metavar="URL", help=hidden)
    add("--serve-files", action="store_true", help=hidden)


def run(args: argparse.Namespace) -> int:
    """Print the name of the new command, and run it."""
    from streamchat.web.serve import serve  # deferred: no other start needs it

    flags.configuration_of(args)
    print("streamchat: --serve is now `streamchat web`; the next release removes the flag", file=sys.stderr)
    return serve(
        Served(flags.given_flags(args), args.serve_host, args.serve, args.serve_url, args.serve_files, args.resume)
    )


def refuse_without_serve(args: argparse.Namespace) -> None:
    """Raise ConfigError if a flag of the server is given without `--serve`."""
    given = {"host": args.serve_host != HOST, "url": bool(args.serve_url), "files": args.serve_files}
    for flag, is_given in given.items():
        if is_given:
            raise ConfigError(f"--serve-{flag} has no effect without --serve; use `streamchat web --{flag}`")
