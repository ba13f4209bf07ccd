"""`streamchat bench` without --ui and --resume: every way to hold a long conversation, side by side in one run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamchat.base.errors import ConfigError
from streamchat.config.loader import Configuration

if TYPE_CHECKING:
    from streamchat.benchmarks.methods import Method
    from streamchat.models.load import LoadedModel
    from streamchat.reports.page import Page

METHODS = ("streamchat", "generate", "re-read", "recompute", "cut")
WORKLOADS = ("decode", "chat")
SAMPLES = 3
"""Turns in a row whose first token is timed at each place."""
REPLY_TOKENS = 48


def add_flags(group: argparse._ArgumentGroup) -> None:
    """Flags of the comparison."""
    group.add_argument("--peers", action="store_true", help="llama.cpp too, where llama-cpp-python is installed")
    group.add_argument(
        "--float32", action="store_true", help="generate in float32 too, with a second copy of the model"
    )
    group.add_argument(
        "--methods", metavar="LIST", help="of streamchat, generate, re-read, recompute, cut (default: all of them)"
    )
    group.add_argument("--workloads", default="decode,chat", metavar="LIST", help="of decode, chat (default: both)")
    group.add_argument(
        "--new-tokens", type=int, default=48, metavar="N", help="tokens written and timed at a time (default: 48)"
    )
    group.add_argument(
        "--turns",
        default="5,50,500",
        metavar="LIST",
        help="turns of the chat at which the time to the first token is measured (default: 5,50,500)",
    )
    group.add_argument(
        "--limit",
        type=float,
        default=20.0,
        metavar="SECONDS",
        help="turns that would take longer than this to their first token are left out, and so are those whose "
        "history takes six times as long to be read (default: 20)",
    )


def measure(
    args: argparse.Namespace, configuration: Configuration, progress: Callable[..., None]
) -> tuple[Page, Path | None]:
    """Measure; the page, and the folder that its files are wanted in.

    Args:
        args: Of the command line.
        configuration: All settings.
        progress: Told what is going on.

    Raises:
        ConfigError: A list or a number is wrong.
        ModelError: The model cannot be had, or cannot stream.
    """
    from streamchat.reports.page import prepare_folder

    wanted = _names(args.workloads, WORKLOADS, "--workloads")
    turns = _turns(args.turns)
    if args.new_tokens < 2:
        raise ConfigError(f"--new-tokens {args.new_tokens} must be at least 2")
    if args.limit <= 0:
        raise ConfigError(f"--limit {args.limit} must be above 0")
    names = _names(args.methods, METHODS, "--methods") if args.methods else list(METHODS)
    folder = None if args.out is None else prepare_folder(args.out)

    from streamchat.cache.context import context_length
    from streamchat.conversation.assemble import load_from_settings
    from streamchat.conversation.budget import resolve_cache_size
    from streamchat.models.quiet import quiet

    loaded = load_from_settings(configuration, progress)
    size, note = resolve_cache_size(configuration, context_length(loaded.model.config))
    with quiet():
        methods, notes = _methods(args, configuration, loaded, size, names)
        notes += [note] if note else []
        return _measure(args, configuration, loaded, methods, wanted, turns, size, notes, progress), folder


def _names(text: str, known: Sequence[str], flag: str) -> list[str]:
    words = [word for word in (part.strip() for part in text.split(",")) if word]
    if wrong := [word for word in words if word not in known]:
        raise ConfigError(f"{flag}: {wrong[0]} is none of {', '.join(known)}")
    if not words:
        raise ConfigError(f"{flag} names nothing; there are {', '.join(known)}")
    return [word for word in known if word in words]


def _turns(text: str) -> list[int]:
    words = [word for word in (part.strip() for part in text.split(",")) if word]
    if wrong := [word for word in words if not word.isdecimal() or int(word) < 1]:
        raise ConfigError(f"--turns: {wrong[0]} is no number of a turn; turns count from 1")
    if not words:
        raise ConfigError("--turns names nothing")
    found = sorted(set(map(int, words)))
    close = [a for a, b in pairwise(found) if b - a < SAMPLES]
    if close:
        raise ConfigError(f"--turns: {close[0]} and the next are closer than the {SAMPLES} turns timed at each")
    return found


def _methods(
    args: argparse.Namespace, configuration: Configuration, loaded: LoadedModel, size: int, names: Sequence[str]
) -> tuple[list[Method], list[str]]:
    import torch

    from streamchat.benchmarks.methods import Generate, make_methods
    from streamchat.benchmarks.peers import find_peers
    from streamchat.models.checked_fit import choose_checked_fit
    from streamchat.models.load import load_model

    sinks = configuration.settings.num_sink_tokens
    known = make_methods(loaded.model, choose_checked_fit(loaded.model), size, sinks)
    methods = [method for method in known if method.name in names]
    if args.float32:
        settings = configuration.settings
        whole = load_model(
            settings.model,
            device=settings.device,
            dtype="float32",
            attention=settings.attention,
            kernels=settings.kernels,
        )
        methods.append(Generate(whole.model, "float32"))
    if not args.peers:
        return methods, []
    peers, notes = find_peers(_gguf(configuration, loaded), size, sinks, torch.get_num_threads())
    return [*methods, *peers], notes


def _gguf(configuration: Configuration, loaded: LoadedModel) -> Path | None:
    """The model as a GGUF file, where it came from one."""
    from streamchat.models.bundled.default import default_gguf

    source = Path(loaded.source)
    if source.suffix == ".gguf" and source.exists():
        return source
    if configuration.settings.model == "default" and default_gguf().exists():
        return default_gguf()
    return None


def _measure(
    args: argparse.Namespace,
    configuration: Configuration,
    loaded: LoadedModel,
    methods: list[Method],
    wanted: Sequence[str],
    turns: Sequence[int],
    size: int,
    notes: list[str],
    progress: Callable[..., None],
) -> Page:
    import torch

    from streamchat.benchmarks.chat_text import make_turns
    from streamchat.benchmarks.compare_page import make_page
    from streamchat.benchmarks.workloads import LATE, measure_chat, measure_decode
    from streamchat.verify.text import help_topic_ids

    decode: Any = {}
    chat: Any = {}
    if "decode" in wanted:
        ids = help_topic_ids(loaded.tokenizer, LATE * size)
        if len(ids) < LATE * size:  # the text is shorter than a very large budget
            ids = (ids * -(-LATE * size // len(ids)))[: LATE * size]
        # reading everything again happens once a turn: a text without turns is `generate`
        ways = [method for method in methods if method.name != "re-read"]
        decode = measure_decode(ways, ids, size, args.new_tokens, args.rounds, progress, loaded.device)
    if "chat" in wanted:
        said = make_turns(loaded.tokenizer, max(turns) + SAMPLES, REPLY_TOKENS)
        chat = measure_chat(methods, said, turns, SAMPLES, args.limit, progress)
    where = f"{loaded.dtype} on {loaded.device}"
    packed = f", streamchat with {loaded.weights} weights" if loaded.weights != "native" else ""
    threads = torch.get_num_threads() if loaded.device == "cpu" else 0
    lines = [
        f"{loaded.name}, {where}{f', {threads} threads' if threads else ''}{packed}, budget {size:,} tokens, "
        f"{configuration.settings.num_sink_tokens} sinks, {args.rounds} rounds in turn after one to warm up"
    ]
    about = {
        "command": "bench",
        "model": loaded.name,
        "source": loaded.source,
        "device": loaded.device,
        "dtype": loaded.dtype,
        "weights": loaded.weights,
        "attention": str(loaded.model.config._attn_implementation),
        "threads": threads,
        "cache_size": size,
        "num_sink_tokens": configuration.settings.num_sink_tokens,
        "rounds": args.rounds,
        "new_tokens": args.new_tokens,
    }
    return make_page(methods, decode, chat, lines, [*loaded.notes, *notes], about)
