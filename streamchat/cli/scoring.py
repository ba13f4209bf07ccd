"""Flags for commands that score texts."""

from __future__ import annotations

import argparse

from streamchat.base.errors import ConfigError

DEFAULT_CHUNK = 16


def add_text_flags(parser: argparse.ArgumentParser, group: argparse._ArgumentGroup, max_tokens: int) -> None:
    """Add FILE..., `--max-tokens` (default: `max_tokens`) and `--chunk`."""
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="text files, one document each; - is stdin (default: Python's help)",
    )
    group.add_argument(
        "--max-tokens",
        type=int,
        default=max_tokens,
        metavar="N",
        help=f"tokens per document; 0 = all (default: {max_tokens})",
    )
    group.add_argument(
        "--chunk",
        type=int,
        default=DEFAULT_CHUNK,
        metavar="N",
        help="tokens per forward pass for bounded policies; --chunk 1 reproduces decoding exactly but is slow "
        f"(default: {DEFAULT_CHUNK})",
    )


def require_at_least(args: argparse.Namespace, **minimum: int) -> None:
    """Check the lower bounds of numeric flags.

    Raises:
        ConfigError: A value is below its minimum.
    """
    for name, smallest in minimum.items():
        value = getattr(args, name)
        if value is not None and value < smallest:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least {smallest}")
