"""`streamchat bench`: measure speed against other methods, decoding (also on a busy machine and on a GPU), the app,
startup, resuming, and right answers by sampling settings."""

from __future__ import annotations

import argparse
from importlib import import_module

from streamchat.base.errors import ConfigError, ExitCode
from streamchat.benchmarks.api_client import CLIENTS
from streamchat.benchmarks.gpu.cases import KINDS, MODEL, SHAPES
from streamchat.benchmarks.loading import SETTINGS
from streamchat.benchmarks.methods.registry import KINDS as METHOD_KINDS
from streamchat.cli import flags
from streamchat.cli.loading import loading_line
from streamchat.cli.output import add_output_flags, output_folder, print_page
from streamchat.cli.scoring import add_methods_flag, require_at_least, summaries

METHODS = "streamchat,dense,re-read,recompute,no-rerotation"
MODES = {
    "ui": ("app", "measure the app"),
    "startup": ("startup", "measure startup, from the command to the first token"),
    "memory": ("peak_memory", "measure the peak memory of a chat, and of llama.cpp if llama-cpp-python is installed"),
    "resume": ("resume", "measure resuming a full cache of --cache-size tokens"),
    "decode": ("decode_page", "measure the decode step on the CPU"),
    "speculative": ("speculation", "measure decoding with and without speculation on the CPU"),
    "busy": ("busy", "measure decoding while N busy loops run, for each N (default: 0,2,4,6)"),
    "serve": ("serving", "measure `streamchat serve` over HTTP, and switching between its sessions"),
    "gpu": ("gpu.command", "measure one GPU: models of several sizes, each with several decode steps"),
    "questions": ("questions", "count right answers to 40 simple questions, by sampling settings"),
}
"""Flag -> module of `streamchat.benchmarks` with `run(args, configuration, progress) -> Page`, and help."""
_DESTS = {"decode": "decode_mode"}
"""Modes with the name of a setting -> their attribute of the arguments."""
BUSY_LOOPS = "0,2,4,6"
COMPARISON = "compare"
"""The module that runs without any of these flags."""
COMPARISON_DEFAULTS: dict[str, object] = {
    "peers": False,
    "float32": False,
    "methods": METHODS,
    "workloads": "decode,chat",
    "turns": "5,50,500",
    "limit": 20.0,
}
"""Defaults of the flags that only the comparison uses."""
REPLY_TOKENS = "128"
SEEDS = 2
TIME_LIMIT_S = 240
"""Default of `--time-limit`."""
SERVE_DEFAULTS: dict[str, object] = {"serve_turns": 500, "serve_sessions": 50, "serve_tokens": 128, "serve_client": ""}
"""Defaults of the flags that only `--serve` uses."""
GPU_FLAGS = ("shapes", "kinds", "time_limit")
MIN_FLAT = 100
"""Minimum of `--flat` with `--gpu`: ten tokens per tenth."""
MAX_THREADS = 1024
"""Maximum of `--threads`: no machine has so many cores, and torch would start them all."""

HELP = (
    "compare speed and memory with other methods; measure the decode step, a busy machine, a GPU, the app, startup, "
    "memory, resuming, and the right answers of each sampling setting"
)
DESCRIPTION = (
    "Benchmark on this machine with one loaded model. By default compares methods of handling a long "
    f"conversation: {summaries(METHODS.split(','))}. "
    "--ui: delay from a key press to the screen while a reply streams (p50, p95), decode speed in the app and "
    "headless, and CPU time of drawing. --startup: time to first paint, loaded model and first token, in parts, "
    "compared with `import torch`, and of `streamchat attach`. --memory: peak memory of a chat, and of llama.cpp "
    "(if llama-cpp-python is installed). --resume: restoring a saved cache compared with prefilling its tokens. "
    "--decode: time per token of the engine and of transformers' forward pass on a full cache on the CPU, with "
    "quantized and with native weights. --speculative: tokens per second with and without speculation, on text that "
    "repeats and on prose. --busy: time per token of streamchat and of llama.cpp while other programs compute. "
    "--serve: time to the first token over HTTP and without a server, switching between sessions, and replies "
    "that take turns. --gpu: tokens per second, share of the measured memory bandwidth, kernels per token and time "
    "to the first token of several models on one GPU, with each decode step and with transformers' generate "
    "(growing cache, and compiled static cache). --questions: right answers to 40 simple questions for each "
    "--sampling."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    flags.add_setting_flags(parser, SETTINGS)
    own = parser.add_argument_group("bench")
    what = own.add_mutually_exclusive_group()
    for name, (_, text) in MODES.items():
        if name == "busy":
            what.add_argument(f"--{name}", nargs="?", const=BUSY_LOOPS, metavar="N,...", help=text)
        else:
            what.add_argument(f"--{name}", action="store_true", dest=_DESTS.get(name, name), help=text)
    own.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds, after one warm-up round (default: 5)")
    _add_comparison_flags(parser.add_argument_group("comparison"))
    _add_step_flags(parser.add_argument_group("decode step and GPU"))
    _add_question_flags(parser.add_argument_group("questions"))
    _add_serve_flags(parser.add_argument_group("serving"))
    own.add_argument(
        "--max-new-tokens", default=REPLY_TOKENS, metavar="TOKENS", help="tokens per reply with --ui (default: 128)"
    )
    add_output_flags(own)


def _add_comparison_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--peers", action="store_true", help="also llama.cpp, if llama-cpp-python is installed")
    group.add_argument("--float32", action="store_true", help="also dense in float32, with a second copy of the model")
    add_methods_flag(group, METHODS, "any", METHOD_KINDS)
    group.add_argument(
        "--workloads",
        default=COMPARISON_DEFAULTS["workloads"],
        metavar="LIST",
        help="workloads: decode, chat (default: both)",
    )
    group.add_argument(
        "--new-tokens", type=int, default=48, metavar="N", help="tokens generated per measurement (default: 48)"
    )
    group.add_argument(
        "--turns",
        default=COMPARISON_DEFAULTS["turns"],
        metavar="LIST",
        help="turns of the chat at which the time to the first token is measured (default: 5,50,500)",
    )
    group.add_argument(
        "--limit",
        type=float,
        default=COMPARISON_DEFAULTS["limit"],
        metavar="SECONDS",
        help="skip turns whose time to first token would exceed this, or whose history takes more than six times as "
        "long to process (default: 20)",
    )


def _add_step_flags(group: argparse._ArgumentGroup) -> None:
    kind = group.add_mutually_exclusive_group()
    kind.add_argument("--profile", action="store_true", help="with --decode: time per token by kind of operation")
    kind.add_argument(
        "--flat",
        "--tokens",
        type=int,
        metavar="TOKENS",
        help="with --decode or --gpu: decode one reply of this length and compare its last tokens with early ones",
    )
    group.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="with --decode or --speculative: number of threads (default: as in a chat)",
    )
    group.add_argument(
        "--cpu-time",
        action="store_true",
        help="with --threads 1: count CPU time instead of elapsed time, for a busy machine",
    )
    group.add_argument(
        "--shapes",
        metavar="LIST",
        help=f"with --gpu: models to measure, of {', '.join(SHAPES)} (default: all); all but {MODEL} have random "
        "weights",
    )
    group.add_argument(
        "--kinds",
        metavar="LIST",
        help=f"with --gpu: steps to measure, of {', '.join(KINDS)} (default: all)",
    )
    group.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help=f"with --gpu: time after which no further row is measured (default: {TIME_LIMIT_S})",
    )


def _add_question_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--sampling",
        action="append",
        metavar="NAME=VALUE,...",
        help="with --questions: settings to measure, such as temperature=0.2,top_p=0.9; what is not named is off; may "
        "be repeated (default: eight choices around temperature 0.7, 0.2 and 0)",
    )
    group.add_argument(
        "--seeds", type=int, metavar="N", default=SEEDS, help=f"with --questions: number of seeds (default: {SEEDS})"
    )


def _add_serve_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--serve-turns",
        type=int,
        metavar="N",
        default=500,
        help="with --serve: turns of one conversation (default: 500)",
    )
    group.add_argument(
        "--serve-sessions", type=int, metavar="N", default=50, help="with --serve: sessions in turn (default: 50)"
    )
    group.add_argument(
        "--serve-tokens",
        type=int,
        metavar="N",
        default=128,
        help="with --serve: tokens of replies that take turns (default: 128)",
    )
    group.add_argument(
        "--serve-client",
        choices=CLIENTS,
        default="",
        help="with --serve: client of the conversation (default: openai if it is installed, else http)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit code.

    Raises:
        ConfigError: An argument is wrong.
        ModelError: The model cannot be loaded, or cannot stream.
        StreamchatError: A reply failed, or was too short to measure.
    """
    _check_flags(args)
    configuration = flags.configuration_of(args)
    folder = output_folder(args)
    mode = _mode(args)
    module = MODES[mode][0] if mode else COMPARISON
    with loading_line() as progress:
        page = import_module(f"streamchat.benchmarks.{module}").run(args, configuration, progress)
    print_page(page, args, folder)
    return ExitCode.OK


def _mode(args: argparse.Namespace) -> str:
    """Return the name of the mode in `MODES`; '' is the comparison."""
    return next((name for name in MODES if getattr(args, _DESTS.get(name, name)) not in (None, False)), "")


def _check_flags(args: argparse.Namespace) -> None:
    """Check numbers, and that flags of one mode are not given for another; raises ConfigError."""
    if args.profile and not args.decode_mode:
        raise ConfigError("--profile needs --decode")
    if args.flat is not None and not (args.decode_mode or args.gpu):
        raise ConfigError("--flat needs --decode or --gpu")
    for name in ("threads", "cpu_time"):
        if getattr(args, name) not in (None, False) and not (args.decode_mode or args.speculative):
            raise ConfigError(f"--{name.replace('_', '-')} needs --decode or --speculative")
    for name, default in (("sampling", None), ("seeds", SEEDS)):
        if getattr(args, name) != default and not args.questions:
            raise ConfigError(f"--{name} needs --questions")
    for name, value in SERVE_DEFAULTS.items():
        if getattr(args, name) != value and not args.serve:
            raise ConfigError(f"--{name.replace('_', '-')} needs --serve")
    _check_gpu_flags(args)
    if args.max_new_tokens != REPLY_TOKENS and not args.ui:
        raise ConfigError("--max-new-tokens needs --ui; --new-tokens is the number for the other measurements")
    mode = _mode(args)
    if mode and (other := [name for name, value in COMPARISON_DEFAULTS.items() if getattr(args, name) != value]):
        raise ConfigError(f"--{other[0]} belongs to the comparison of methods; leave it or --{mode} out")
    if args.cpu_time and args.threads != 1:
        raise ConfigError("--cpu-time counts the time of one thread; add --threads 1")
    if args.cpu_time and args.profile:
        raise ConfigError("--cpu-time does not work with --profile; choose one")
    require_at_least(args, rounds=1, new_tokens=2, threads=1, seeds=1, serve_turns=2, serve_sessions=2, serve_tokens=2)
    if args.threads is not None and args.threads > MAX_THREADS:
        raise ConfigError(f"--threads {args.threads} must be at most {MAX_THREADS}")
    if not args.limit > 0:  # nor NaN
        raise ConfigError(f"--limit {args.limit} must be above 0")


def _check_gpu_flags(args: argparse.Namespace) -> None:
    """Check the flags of `--gpu`, and set the default of `--time-limit`; raises ConfigError."""
    if not args.gpu:
        for name in GPU_FLAGS:
            if getattr(args, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} needs --gpu")
    elif args.flat is not None and args.flat < MIN_FLAT:
        raise ConfigError(f"--flat {args.flat} must be at least {MIN_FLAT}")
    if args.time_limit is None:
        args.time_limit = TIME_LIMIT_S
    if not args.time_limit > 0:  # nor NaN
        raise ConfigError(f"--time-limit {args.time_limit:g} must be above 0")
