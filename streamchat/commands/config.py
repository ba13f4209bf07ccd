"""`streamchat config`: the settings in force, where each came from, and which file is read."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from streamchat import config
from streamchat.chat.text import one_line
from streamchat.commands import flags

if TYPE_CHECKING:
    from streamchat.commands.parser import Subparsers


def add_parser(subparsers: Subparsers[Any]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "config",
        help="print the settings in force and where each came from",
        description="Print the settings in force as a configuration file; comments say where each came from.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--path", action="store_true", help="print the file that is read, or would be if it were there")
    what.add_argument("--default", action="store_true", help="print the defaults instead: a file to start from")
    flags.add_setting_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out the command; raises ConfigError for wrong settings (not with `--path` or `--default`)."""
    if args.path:
        print(one_line(str(config.find_file(flags.config_file_of(args)) or config.user_file())))
    elif args.default:
        print(config.render_toml(), end="")
    else:
        print(config.render_toml(flags.configuration_of(args)), end="")
    return 0
