"""`streamchat bench`: speed beside other ways, how the app feels, and what resuming costs, in figures."""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from streamchat.base.errors import ConfigError, ExitCode
from streamchat.base.formatting import human_bytes
from streamchat.benchmarks import compare
from streamchat.cli import flags
from streamchat.cli.loading import Progress, loading_line
from streamchat.cli.output import add_output_flags, print_page
from streamchat.config import loader
from streamchat.config.loader import Configuration

if TYPE_CHECKING:
    from streamchat.cli.flags import Subparsers
    from streamchat.models.load import LoadedModel

SETTINGS = ("model", "device", "dtype", "attention", "weights", "kernels", "cache_size", "num_sink_tokens")


def add_parser(subparsers: Subparsers[Any]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "bench",
        help="measure speed and memory beside other ways, the app, and resuming",
        description="Measure on this machine, in one run and with one loaded model. By default the ways to hold a long "
        "conversation side by side: streamchat, transformers' generate with a growing cache, the whole history read "
        "again at each turn, the window read again for each token, and a hook that cuts keys and leaves positions "
        "alone. --ui: the delay from a key to the screen while a reply streams (p50, p95), the decode speed in the app "
        "against headless, and the processor time of drawing. --startup: first paint, ready model, first token. "
        "--resume: putting a saved cache back, against reading its tokens again.",
    )
    flags.add_setting_flags(parser, SETTINGS)
    own = parser.add_argument_group("bench")
    what = own.add_mutually_exclusive_group()
    what.add_argument("--ui", action="store_true", help="measure the app")
    what.add_argument("--startup", action="store_true", help="measure starting, from the command to the first token")
    what.add_argument("--resume", action="store_true", help="measure resuming a full cache of --cache-size tokens")
    own.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds, after one to warm up (default: 5)")
    compare.add_flags(parser.add_argument_group("side by side"))
    own.add_argument(
        "--max-new-tokens", default="128", metavar="TOKENS", help="length of a reply with --ui (default: 128)"
    )
    add_output_flags(own)


def run(args: argparse.Namespace) -> int:
    """Carry it out; returns the exit code.

    Raises:
        ConfigError: Nothing was asked for, or a number is wrong.
        ModelError: The model cannot be had, or cannot stream.
        StreamchatError: A reply failed, or was too short to be measured.
    """
    if args.rounds < 1:
        raise ConfigError(f"--rounds {args.rounds} must be at least 1")
    configuration = flags.configuration_of(args)
    with loading_line() as progress:
        if args.startup:
            figures, text = _startup(args, progress)
        elif args.ui or args.resume:
            from streamchat.conversation.assemble import load_from_settings

            # In a thread that ends, as the engines' do: where the threads of two pools are more than there are cores,
            # OpenMP lets them sleep at each barrier, which makes a token three times as slow.
            with ThreadPoolExecutor(1) as elsewhere:
                loaded = elsewhere.submit(load_from_settings, configuration, progress).result()
            figures, text = (_ui if args.ui else _resume)(configuration, loaded, args.rounds, progress)
        else:
            page, folder = compare.measure(args, configuration, progress)
    if not (args.startup or args.ui or args.resume):
        print_page(page, args, folder)
        return ExitCode.OK
    sys.stdout.write(text + "\n" + (json.dumps(figures) + "\n" if args.json else ""))
    return ExitCode.OK


def _startup(args: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], str]:
    from streamchat.benchmarks import startup

    arguments = [
        f"{loader.flag_of(name)}={value}" for name in SETTINGS if (value := getattr(args, name, None)) is not None
    ]
    figures = startup.measure(arguments, args.rounds, progress)
    return figures, startup.as_text(figures)


def _ui(
    configuration: Configuration, loaded: LoadedModel, rounds: int, progress: Progress
) -> tuple[dict[str, Any], str]:
    from streamchat.benchmarks.app import measure_ui  # late: it needs Textual

    figures = measure_ui(configuration, lambda *_: loaded, rounds, progress)
    text = (
        f"{loaded.name}, {loaded.dtype} on {loaded.device}, {figures.rounds} rounds of {figures.tokens} tokens\n"
        f"key to screen while streaming  p50 {figures.key_to_screen_p50_ms:.1f} ms, "
        f"p95 {figures.key_to_screen_p95_ms:.1f} ms ({figures.keys} keys)\n"
        f"decode in the app              {figures.app_tps:.1f} tok/s\n"
        f"decode headless                {figures.headless_tps:.1f} tok/s\n"
        f"app / headless                 {figures.ratio:.3f}, while typing {figures.typing_ratio:.3f}\n"
        f"drawing                        {100 * figures.core_share:.1f} % of a core"
    )
    return figures.as_dict(), text


def _resume(
    configuration: Configuration, loaded: LoadedModel, rounds: int, progress: Progress
) -> tuple[dict[str, Any], str]:
    from streamchat.benchmarks.resume import TRANSCRIPT_TURNS, measure_resume

    figures = measure_resume(configuration, loaded, rounds, progress)
    same = "equal to the bit" if figures.same_logits else "NOT equal"
    text = (
        f"{loaded.name}, {loaded.dtype} on {loaded.device}, {figures.tokens} tokens in the cache, "
        f"{figures.rounds} rounds\n"
        f"saving           {figures.save_ms:.0f} ms, {human_bytes(figures.snapshot_bytes)}\n"
        f"resuming         {figures.resume_ms:.0f} ms; the next logits are {same}\n"
        f"reading it again {figures.prefill_ms:.0f} ms\n"
        f"ratio            {figures.ratio:.1f}\n"
        f"the transcript   {figures.transcript_ms:.0f} ms for {TRANSCRIPT_TURNS:,} turns, beside that"
    )
    return figures.as_dict(), text
