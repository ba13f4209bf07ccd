"""Flags of the commands that score texts."""

from __future__ import annotations

import argparse

from streamchat.base.errors import ConfigError

DEFAULT_CHUNK = 16


def add_text_flags(parser: argparse.ArgumentParser, group: argparse._ArgumentGroup, max_tokens: int) -> None:
    """FILE..., `--max-tokens` with this default, `--chunk`."""
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="texts, each a document of its own; - is stdin (default: Python's help)",
    )
    group.add_argument(
        "--max-tokens",
        type=int,
        default=max_tokens,
        metavar="N",
        help=f"of each document; 0 = all (default: {max_tokens})",
    )
    group.add_argument(
        "--chunk",
        type=int,
        default=DEFAULT_CHUNK,
        metavar="N",
        help="tokens a forward where there is a budget, room is made for so many at a time; 1 is exactly what happens "
        f"when a reply is written, and slow (default: {DEFAULT_CHUNK})",
    )


def require_least(args: argparse.Namespace, **least: int) -> None:
    """Check numbers of flags that were given.

    Raises:
        ConfigError: One is below its least value.
    """
    for name, smallest in least.items():
        value = getattr(args, name)
        if value is not None and value < smallest:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least {smallest}")
