"""`streamchat bench`: measure speed against other methods, the decode step, a GPU, the app, startup and resuming."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from streamchat.base.errors import ConfigError, ExitCode
from streamchat.base.formatting import human_bytes
from streamchat.benchmarks import compare
from streamchat.cli import flags
from streamchat.cli.loading import Progress, loading_line
from streamchat.cli.output import add_output_flags, print_page
from streamchat.commands import bench_step
from streamchat.commands.bench_step import Result
from streamchat.config import loader
from streamchat.config.loader import Configuration

if TYPE_CHECKING:
    from streamchat.cli.flags import Subparsers
    from streamchat.models.load import LoadedModel

SETTINGS = ("model", "device", "dtype", "attention", "weights", "kernels", "cache_size", "num_sink_tokens", "evict")


def add_parser(subparsers: Subparsers[Any]) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "bench",
        help="measure speed and memory against other methods, the decode step, a GPU, the app, startup and resuming",
        description="Benchmark on this machine with one loaded model. By default compares ways of handling a long "
        "conversation: streamchat, transformers' generate with a growing cache, prefill of the whole history at each "
        "turn, prefill of the window for each token, and a hook that crops keys without correcting positions. "
        "--ui: delay from a key press to the screen while a reply streams (p50, p95), decode speed in the app and "
        "headless, and CPU time of drawing. --startup: time to first paint, loaded model and first token. "
        "--resume: restoring a saved cache compared with prefilling its tokens. --decode: time per token of the engine "
        "and of transformers' forward pass on a full cache on the CPU, with quantized and with native weights. --gpu: "
        "tokens per second of the engine and of transformers' generate on one GPU, the limit set by the GPU's memory "
        "bandwidth, and memory and time per token over a long stream.",
    )
    flags.add_setting_flags(parser, SETTINGS)
    own = parser.add_argument_group("bench")
    what = own.add_mutually_exclusive_group()
    what.add_argument("--ui", action="store_true", help="measure the app")
    what.add_argument("--startup", action="store_true", help="measure startup, from the command to the first token")
    what.add_argument("--resume", action="store_true", help="measure resuming a full cache of --cache-size tokens")
    what.add_argument("--decode", action="store_true", help="measure the decode step on the CPU")
    what.add_argument("--gpu", action="store_true", help="measure one GPU, with native weights")
    own.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds, after one warm-up round (default: 5)")
    compare.add_flags(parser.add_argument_group("comparison"))
    bench_step.add_flags(parser)
    own.add_argument(
        "--max-new-tokens", default="128", metavar="TOKENS", help="tokens per reply with --ui (default: 128)"
    )
    add_output_flags(own)


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit code.

    Raises:
        ConfigError: An argument is wrong.
        ModelError: The model cannot be loaded, or cannot stream.
        StreamchatError: A reply failed, or was too short to measure.
    """
    if args.rounds < 1:
        raise ConfigError(f"--rounds {args.rounds} must be at least 1")
    bench_step.check_flags(args)
    configuration = flags.configuration_of(args)
    mode = next((_MODES[name] for name in _MODES if getattr(args, name)), None)
    with loading_line() as progress:
        if mode is None:
            page, folder = compare.measure(args, configuration, progress)
        else:
            figures, text = mode(args, configuration, progress)
    if mode is None:
        print_page(page, args, folder)
    else:
        sys.stdout.write(text + "\n" + (json.dumps(figures) + "\n" if args.json else ""))
    return ExitCode.OK


def _load(configuration: Configuration, progress: Progress) -> LoadedModel:
    """Load the model in a thread that ends, like an engine's.

    If two OpenMP pools have more threads than there are cores, they sleep at each barrier, which makes decoding three
    times slower.
    """
    from streamchat.conversation.assemble import load_from_settings

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(load_from_settings, configuration, progress).result()


def _startup(args: argparse.Namespace, configuration: Configuration, progress: Progress) -> Result:
    from streamchat.benchmarks import startup

    arguments = [
        f"{loader.flag_of(name)}={value}" for name in SETTINGS if (value := getattr(args, name, None)) is not None
    ]
    figures = startup.measure(arguments, args.rounds, progress)
    return figures, startup.as_text(figures)


def _ui(args: argparse.Namespace, configuration: Configuration, progress: Progress) -> Result:
    from streamchat.benchmarks.app import measure_ui  # deferred: needs Textual

    loaded = _load(configuration, progress)
    figures = measure_ui(configuration, lambda *_: loaded, args.rounds, progress)
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


def _resume(args: argparse.Namespace, configuration: Configuration, progress: Progress) -> Result:
    from streamchat.benchmarks.resume import TRANSCRIPT_TURNS, measure_resume

    loaded = _load(configuration, progress)
    figures = measure_resume(configuration, loaded, args.rounds, progress)
    same = "bit-identical" if figures.same_logits else "NOT identical"
    text = (
        f"{loaded.name}, {loaded.dtype} on {loaded.device}, {figures.tokens} tokens in the cache, "
        f"{figures.rounds} rounds\n"
        f"saving           {figures.save_ms:.0f} ms, {human_bytes(figures.snapshot_bytes)}\n"
        f"resuming         {figures.resume_ms:.0f} ms; the next logits are {same}\n"
        f"prefill          {figures.prefill_ms:.0f} ms\n"
        f"ratio            {figures.ratio:.1f}\n"
        f"the transcript   {figures.transcript_ms:.0f} ms for {TRANSCRIPT_TURNS:,} turns, in addition"
    )
    return figures.as_dict(), text


_MODES: dict[str, Callable[[argparse.Namespace, Configuration, Progress], Result]] = {
    "startup": _startup,
    "ui": _ui,
    "resume": _resume,
    "decode": bench_step.measure_decode,
    "gpu": bench_step.measure_gpu,
}
