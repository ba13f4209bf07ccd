"""`streamchat bench --ui`: how the app feels, in figures."""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from streamchat.chat.events import ModelLoading
from streamchat.chat.progress import ProgressLine
from streamchat.commands import flags
from streamchat.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from streamchat.commands.parser import Subparsers


def add_parser(subparsers: Subparsers[Any]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "bench",
        help="measure how the app feels: key-to-screen delay, and what drawing costs",
        description="Measure on this machine, in one run and with one loaded model: the delay from a key to the screen "
        "while a reply streams (p50, p95), the decode speed in the app against headless, and the "
        "processor time of drawing.",
    )
    flags.add_setting_flags(parser, ("model", "device", "dtype", "attention", "cache_size"))
    own = parser.add_argument_group("bench")
    own.add_argument("--ui", action="store_true", help="measure the app (the only bench so far)")
    own.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds of three replies (default: 5)")
    own.add_argument("--max-new-tokens", default="128", metavar="TOKENS", help="length of a reply (default: 128)")
    own.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Carry it out; returns the exit code.

    Raises:
        ConfigError: Nothing was asked for, or a number is wrong.
        ModelError: The model cannot be had, or cannot stream.
        StreamchatError: A reply failed, or was too short to be measured.
    """
    if not args.ui:
        raise ConfigError("nothing to measure; give --ui")
    if args.rounds < 1:
        raise ConfigError(f"--rounds {args.rounds} must be at least 1")
    configuration = flags.configuration_of(args)
    line = ProgressLine(sys.stderr)

    def progress(stage: str, done: int = 0, total: int = 0, unit: str = "") -> None:
        line.show(ModelLoading(stage, done, total, "bytes" if unit == "bytes" else ""))

    try:
        from streamchat.chat.assemble import load_from_settings

        loaded = load_from_settings(configuration, progress)
        # headless commands know nothing of the app; this one is about it
        bench: Any = import_module("streamchat.tui.bench")
        figures = bench.measure_ui(configuration, lambda *_: loaded, args.rounds, progress)
    finally:
        line.clear()
    if args.json:
        text = json.dumps(figures.as_dict())
    else:
        text = (
            f"{loaded.name}, {loaded.dtype} on {loaded.device}, {figures.rounds} rounds of {figures.tokens} tokens\n"
            f"key to screen while streaming  p50 {figures.key_to_screen_p50_ms:.1f} ms, "
            f"p95 {figures.key_to_screen_p95_ms:.1f} ms ({figures.keys} keys)\n"
            f"decode in the app              {figures.app_tps:.1f} tok/s\n"
            f"decode headless                {figures.headless_tps:.1f} tok/s\n"
            f"app / headless                 {figures.ratio:.3f}, while typing {figures.typing_ratio:.3f}\n"
            f"drawing                        {100 * figures.core_share:.1f} % of a core"
        )
    sys.stdout.write(text + "\n")
    return ExitCode.OK
