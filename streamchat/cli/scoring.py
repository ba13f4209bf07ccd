"""Flags for commands that measure methods on texts."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from streamchat.base.devices import device_type
from streamchat.base.errors import ConfigError
from streamchat.benchmarks.methods.registry import KINDS

DEFAULT_CHUNK = 16
GPU_CHUNK = 128
"""On CUDA a forward of 128 tokens takes about as long as one of 16: both are limited by kernel launches."""


def default_chunk(device: str) -> int:
    """Return the default of `--chunk` in `ppl` for the device of the model."""
    return GPU_CHUNK if device_type(device) == "cuda" else DEFAULT_CHUNK


def add_methods_flag(group: argparse._ArgumentGroup, default: str, form: str, names: Iterable[str]) -> None:
    """Add `--methods`, which names the methods to compare; `--policies` was its name in `ppl` and `sweep`.

    Args:
        group: Where to add it.
        default: Default list.
        form: What an entry of the list looks like, for the help.
        names: Methods that the command knows.
    """
    text = f"{form} of {', '.join(names)} (default: {default})"
    group.add_argument("--methods", "--policies", default=default, metavar="LIST", help=text)


def summaries(names: Iterable[str]) -> str:
    """Describe methods for the help of a command: `dense (a growing cache), ...`."""
    return ", ".join(f"{name} ({KINDS[name].summary})" for name in names)


def add_text_flags(
    parser: argparse.ArgumentParser, group: argparse._ArgumentGroup, max_tokens: int, *, by_device: bool = False
) -> None:
    """Add FILE..., `--max-tokens` (default: `max_tokens`) and `--chunk`, by default None if chosen `by_device`."""
    chunk = f"{DEFAULT_CHUNK}, on a GPU {GPU_CHUNK}" if by_device else str(DEFAULT_CHUNK)
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="text files, one document each; - is stdin (default: the text of Python's help)",
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
        default=None if by_device else DEFAULT_CHUNK,
        metavar="N",
        help="tokens per forward pass for bounded methods; --chunk 1 reproduces decoding exactly but is slow "
        f"(default: {chunk})",
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
