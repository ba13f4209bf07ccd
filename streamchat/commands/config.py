"""`streamchat config`: print the settings in use, their origins, and the configuration file that is read."""

from __future__ import annotations

import argparse
from pathlib import Path

from streamchat.base import paths
from streamchat.base.errors import ConfigError
from streamchat.base.jsonlines import json_line
from streamchat.base.sanitize import one_line
from streamchat.cli import flags
from streamchat.config import loader, trust
from streamchat.config.files import LOCAL, find_local, parse
from streamchat.config.render import render_toml

HELP = "print the settings in use and their origins"
DESCRIPTION = "Print the settings in use as a configuration file; comments name the origin of each."


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--path", action="store_true", help="print the path of the file that is read, even if it does not exist yet"
    )
    what.add_argument(
        "--trust",
        nargs="?",
        const=".",
        metavar="FOLDER",
        help="let config.toml in this folder (default: the current one) set everything until the file changes",
    )
    what.add_argument(
        "--untrust", nargs="?", const=".", metavar="FOLDER", help="stop trusting config.toml in this folder"
    )
    what.add_argument("--default", action="store_true", help="print the defaults instead, as a file to start from")
    flags.add_setting_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit code.

    Raises:
        ConfigError: A setting is wrong (not with `--path` or `--default`), or the file cannot be trusted.
    """
    if args.trust is not None:
        _trust(paths.user_path(args.trust))
    elif args.untrust is not None:
        _untrust(paths.user_path(args.untrust))
    elif args.path:
        print(one_line(str(loader.find_file(flags.config_file_of(args)) or loader.user_file())))
    elif args.default:
        print(render_toml(), end="")
    else:
        from streamchat.models.sampling import advised

        print(render_toml(advised(flags.configuration_of(args, announce=False))), end="")
    return 0


def _trust(folder: Path) -> None:
    """Trust the folder's current file and print what it sets."""
    local = find_local(folder)
    if local is None:
        raise ConfigError(
            f"{folder / LOCAL} does not exist or is not a streamchat configuration; give the folder that has one"
        )
    if not local.data:
        raise ConfigError(f"{local.path} {local.problem}; it cannot be trusted")
    content = parse(local.path, local.data)
    given = loader.effective_values(content.values, local.path)
    trust.trust(local.path, local.data)
    print(one_line(f"{local.path} is trusted until it changes; `streamchat config --untrust` stops trusting it"))
    for name, value in given.items():
        print(one_line(f"{name} = {json_line(value)}"))
    for key, names in content.keys.items():
        print(one_line(f"{key} = {json_line(names)}"))


def _untrust(folder: Path) -> None:
    """Stop trusting the folder's file."""
    path = folder.resolve() / LOCAL
    if not trust.untrust(path):
        raise ConfigError(f"{path} was not trusted")
    print(one_line(f"stopped trusting {path}"))
