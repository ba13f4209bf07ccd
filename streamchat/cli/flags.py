"""Command line flags generated from the settings, for the chat and for commands that accept settings."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from streamchat.base.errors import ConfigError
from streamchat.base.sanitize import one_line
from streamchat.config import loader
from streamchat.config.settings import default_of, setting_fields, spec_of
from streamchat.config.template_args import parse_argument

Subparsers = argparse._SubParsersAction  # the type has no public name


def add_setting_flags(parser: argparse.ArgumentParser, names: Iterable[str] | None = None) -> None:
    """Add `--config` and one flag per setting (`names`, default: all). Flags that are not given set no attribute.

    Values stay text until `configuration_of` checks them, so that errors read the same as for a file.
    """
    parser.add_argument(
        "--config",
        dest="config_file",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="configuration file (default: the user's and ./config.toml; see `streamchat config --trust`)",
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name in setting_fields() if names is None else names:
        spec = spec_of(name)
        if spec.section not in groups:
            groups[spec.section] = parser.add_argument_group(spec.section)
        add = groups[spec.section].add_argument
        text, default = spec.help.replace("%", "%%"), default_of(name)
        if isinstance(default, bool):
            add(
                loader.flag_of(name),
                dest=name,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=f"{text} (default: {'yes' if default else 'no'})",
            )
            continue
        if spec.is_table:
            about = f"{text}; can be repeated"
            add(
                loader.flag_of(name),
                dest=name,
                action="append",
                metavar=spec.metavar,
                default=argparse.SUPPRESS,
                help=about,
            )
            continue
        advised = "the model's, else " if spec.by_model else ""
        shown = f" (default: {advised}{default})" if default != "" else ""
        add(
            loader.flag_of(name),
            dest=name,
            metavar="{" + ",".join(spec.words) + "}" if spec.choices else spec.metavar or _metavar(default),
            default=argparse.SUPPRESS,
            action=_JoinedAction if spec.joined_by else "store",
            help=text + shown.replace("%", "%%"),
        )


class _JoinedAction(argparse.Action):
    """Joins the values of a flag that is given several times."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, *_: Any) -> None:
        before = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, value if before is None else f"{before}{spec_of(self.dest).joined_by}{value}")


def _metavar(default: Any) -> str:
    return {int: "N", float: "X"}.get(type(default), "TEXT")


def configuration_of(args: argparse.Namespace, *, announce: bool = True) -> loader.Configuration:
    """Load the settings from flags, environment and configuration files; raises ConfigError.

    Args:
        announce: Print on stderr what `./config.toml` of the current folder sets, if anything.
    """
    flags: dict[str, Any] = {}
    for name in setting_fields():
        given = getattr(args, name, None)
        if isinstance(given, list):
            given = _table(given, loader.flag_of(name))
        flags[name] = loader.parse_text(name, given, loader.flag_of(name)) if isinstance(given, str) else given
    configuration = loader.load(flags, config_file=config_file_of(args))
    if announce and configuration.local_notice and sys.stderr is not None:
        print(f"streamchat: {one_line(configuration.local_notice)}", file=sys.stderr, flush=True)
    return configuration


def _table(given: list[str], flag: str) -> dict[str, Any]:
    """Return the table of a flag that was given several times; raises ConfigError."""
    try:
        return dict(parse_argument(each) for each in given)
    except ValueError as error:
        raise ConfigError(f"{flag}: {error}") from None


def config_file_of(args: argparse.Namespace) -> Path | None:
    """Return the value of `--config`."""
    given = getattr(args, "config_file", None)
    return None if given is None else Path(given)


def given_flags(args: argparse.Namespace) -> tuple[str, ...]:
    """Return `--config` and the setting flags in `args`, for the command line of another process."""
    found = [] if (file := config_file_of(args)) is None else [f"--config={file.absolute()}"]
    for name in setting_fields():
        value, flag = getattr(args, name, None), loader.flag_of(name)
        if isinstance(value, bool):
            found.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            found += [f"{flag}={each}" for each in (value if isinstance(value, list) else [value])]
    return tuple(found)
