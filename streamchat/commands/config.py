"""`streamchat config`: the settings in force, where each came from, and which file is read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamchat.base import paths
from streamchat.base.errors import ConfigError
from streamchat.base.jsonlines import json_line
from streamchat.base.sanitize import one_line
from streamchat.cli import flags
from streamchat.config import loader, trust
from streamchat.config.files import LOCAL, find_local, parse
from streamchat.config.render import render_toml

if TYPE_CHECKING:
    from streamchat.cli.parser import Subparsers


def add_parser(subparsers: Subparsers[Any]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "config",
        help="print the settings in force and where each came from",
        description="Print the settings in force as a configuration file; comments say where each came from.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--path", action="store_true", help="print the file that is read, or would be if it were there")
    what.add_argument(
        "--trust",
        nargs="?",
        const=".",
        metavar="FOLDER",
        help="let config.toml in this folder (default: the current one) set everything, until the file changes",
    )
    what.add_argument("--untrust", nargs="?", const=".", metavar="FOLDER", help="stop trusting it")
    what.add_argument("--default", action="store_true", help="print the defaults instead: a file to start from")
    flags.add_setting_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Carry out the command; raises ConfigError for wrong settings (not with `--path` or `--default`), and for a file
    that cannot be trusted."""
    if args.trust is not None:
        _trust(paths.user_path(args.trust))
    elif args.untrust is not None:
        _untrust(paths.user_path(args.untrust))
    elif args.path:
        print(one_line(str(loader.find_file(flags.config_file_of(args)) or loader.user_file())))
    elif args.default:
        print(render_toml(), end="")
    else:
        print(render_toml(flags.configuration_of(args, announce=False)), end="")
    return 0


def _trust(folder: Path) -> None:
    """Trust the folder's file as it is now, and print what it sets."""
    local = find_local(folder)
    if local is None:
        raise ConfigError(
            f"{folder / LOCAL} is not there or not a streamchat configuration; give the folder that has one"
        )
    if not local.data:
        raise ConfigError(f"{local.path} {local.problem}; it cannot be trusted")
    content = parse(local.path, local.data)
    given = loader.non_default_values(content.values, local.path)
    trust.trust(local.path, local.data)
    print(one_line(f"{local.path} is trusted until it changes; `streamchat config --untrust` stops trusting it"))
    for name, value in given.items():
        print(one_line(f"{name} = {json_line(value)}"))
    for key, names in content.keys.items():
        print(one_line(f"{key} = {json_line(names)}"))


def _untrust(folder: Path) -> None:
    """Trust the folder's file no longer."""
    path = folder.resolve() / LOCAL
    if not trust.untrust(path):
        raise ConfigError(f"{path} was not trusted")
    print(one_line(f"{path} is no longer trusted"))
