"""`streamchat bench` without --ui and --resume: compares decoding of handling a long conversation in one run."""

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
"""Consecutive turns whose time to first token is measured, at each turn of --turns."""
REPLY_TOKENS = 48


def add_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of the comparison."""
    group.add_argument("--peers", action="store_true", help="also llama.cpp, if llama-cpp-python is installed")
    group.add_argument(
        "--float32", action="store_true", help="also generate in float32, with a second copy of the model"
    )
    group.add_argument(
        "--methods",
        metavar="LIST",
        help="methods to compare: streamchat, generate, re-read, recompute, cut (default: all)",
    )
    group.add_argument(
        "--workloads", default="decode,chat", metavar="LIST", help="workloads: decode, chat (default: both)"
    )
    group.add_argument(
        "--new-tokens", type=int, default=48, metavar="N", help="tokens generated per measurement (default: 48)"
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
        help="skip turns whose time to first token would exceed this, or whose history takes more than six times as "
        "long to process (default: 20)",
    )


def measure(
    args: argparse.Namespace, configuration: Configuration, progress: Callable[..., None]
) -> tuple[Page, Path | None]:
    """Run the comparison; return its page, and the folder for its files if one was requested.

    Args:
        args: Arguments of the command line.
        configuration: All settings.
        progress: Called with progress messages.

    Raises:
        ConfigError: A list or a number is invalid.
        ModelError: The model cannot be loaded, or cannot stream.
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
        raise ConfigError(f"{flag}: {wrong[0]} is not one of {', '.join(known)}")
    if not words:
        raise ConfigError(f"{flag} is empty; choose from {', '.join(known)}")
    return [word for word in known if word in words]


def _turns(text: str) -> list[int]:
    words = [word for word in (part.strip() for part in text.split(",")) if word]
    if wrong := [word for word in words if not word.isdecimal() or int(word) < 1]:
        raise ConfigError(f"--turns: {wrong[0]} is not a turn number (turns count from 1)")
    if not words:
        raise ConfigError("--turns is empty; give turn numbers such as 5,50,500")
    found = sorted(set(map(int, words)))
    close = [a for a, b in pairwise(found) if b - a < SAMPLES]
    if close:
        raise ConfigError(f"--turns: {close[0]} and the next one must be at least {SAMPLES} turns apart")
    return found


def _methods(
    args: argparse.Namespace, configuration: Configuration, loaded: LoadedModel, size: int, names: Sequence[str]
) -> tuple[list[Method], list[str]]:
    import torch

    from streamchat.benchmarks.methods import Generate, make_methods
    from streamchat.benchmarks.peers import find_peers
    from streamchat.models.checked_fit import choose_checked_fit
    from streamchat.models.load import load_model

    sinks, evict = configuration.settings.num_sink_tokens, configuration.settings.evict
    known = make_methods(loaded.model, choose_checked_fit(loaded.model), size, sinks, evict)
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
    """Return the GGUF file that the model was loaded from, or None."""
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
        # re-read prefills the history once per turn: for a text without turns, it is the same as `generate`
        decoding = [method for method in methods if method.name != "re-read"]
        decode = measure_decode(decoding, ids, size, args.new_tokens, args.rounds, progress, loaded.device)
    if "chat" in wanted:
        script = make_turns(loaded.tokenizer, max(turns) + SAMPLES, REPLY_TOKENS)
        chat = measure_chat(methods, script, turns, SAMPLES, args.limit, progress)
    where = f"{loaded.dtype} on {loaded.device}"
    quantized = f", streamchat with {loaded.weights} weights" if loaded.weights != "native" else ""
    threads = torch.get_num_threads() if loaded.device == "cpu" else 0
    settings = configuration.settings
    lines = [
        f"{loaded.name}, {where}{f', {threads} threads' if threads else ''}{quantized}, budget {size:,} tokens, "
        f"{settings.num_sink_tokens} sinks, evict = {settings.evict}, {args.rounds} rounds after one to warm up"
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
        "num_sink_tokens": settings.num_sink_tokens,
        "evict": settings.evict,
        "rounds": args.rounds,
        "new_tokens": args.new_tokens,
    }
    return make_page(methods, decode, chat, lines, [*loaded.notes, *notes], about)
