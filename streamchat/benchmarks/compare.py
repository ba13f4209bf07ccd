"""`streamchat bench` without another mode: compares methods of handling a long conversation in one run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from streamchat.base.errors import ConfigError, short
from streamchat.base.formatting import parse_whole_number, plural
from streamchat.base.progress import Progress
from streamchat.benchmarks.chat_text import make_turns
from streamchat.benchmarks.compare_page import make_page
from streamchat.benchmarks.loading import about, cache_size, gguf_file, heading
from streamchat.benchmarks.methods.llama_cpp import find_peers
from streamchat.benchmarks.methods.registry import KINDS, Method, make_method, parse_kinds, split_list
from streamchat.benchmarks.methods.stream import Stream, open_stream
from streamchat.benchmarks.methods.streaming import Chat
from streamchat.benchmarks.workloads import LATE, measure_chat, measure_decode
from streamchat.config.loader import Configuration
from streamchat.models.checked_fit import choose_checked_fit
from streamchat.models.load import LoadedModel, load_from_settings
from streamchat.models.quiet import quiet
from streamchat.quantization.matrix import QuantizedMatrix
from streamchat.reports.page import Page
from streamchat.verify.text import help_topic_ids

WORKLOADS = ("decode", "chat")
SAMPLES = 3
"""Consecutive turns whose time to first token is measured, at each turn of --turns."""
REPLY_TOKENS = 48


def run(args: argparse.Namespace, configuration: Configuration, progress: Progress) -> Page:
    """Run the comparison.

    Raises:
        ConfigError: A list or a number is invalid.
        ModelError: The model cannot be loaded, or cannot stream.
    """
    wanted = split_list(args.workloads, "--workloads")
    if wrong := [word for word in wanted if word not in WORKLOADS]:
        raise ConfigError(f"--workloads: {wrong[0]} is not one of {', '.join(WORKLOADS)}")
    turns = _turns(args.turns)
    kinds = parse_kinds(args.methods, tuple(KINDS))
    loaded = load_from_settings(configuration.settings, progress)
    size, note = cache_size(configuration, loaded)
    with quiet():
        streams, notes = _streams(args, configuration, loaded, size, kinds, progress)
        decode: Any = {}
        chat: Any = {}
        if "decode" in wanted:
            ids = help_topic_ids(loaded.tokenizer, LATE * size)
            ids = (ids * -(-LATE * size // len(ids)))[: LATE * size]  # the text may be shorter than a very large budget
            # re-read prefills the history once per turn: for a text without turns, it is the same as dense
            decoding = [stream for stream in streams if stream.name != "re-read"]
            decode = measure_decode(decoding, ids, size, args.new_tokens, args.rounds, progress, loaded.device)
        if "chat" in wanted:
            script = make_turns(loaded.tokenizer, max(turns) + SAMPLES, REPLY_TOKENS)
            chat = measure_chat(streams, script, turns, SAMPLES, args.limit, progress)
    settings = configuration.settings
    cache = {"cache_size": size, "num_sink_tokens": settings.num_sink_tokens, "evict": settings.evict}
    lines = heading(
        loaded,
        f"budget {size:,} tokens",
        f"{settings.num_sink_tokens} sinks",
        f"evict = {settings.evict}",
        f"{plural(args.rounds, 'round')} after one to warm up",
    )
    if loaded.weights != "native":
        lines.append(f"Methods other than streamchat's own cache use native weights, not {loaded.weights}.")
    data = about("bench", loaded, **cache, rounds=args.rounds, new_tokens=args.new_tokens)
    return make_page(streams, decode, chat, lines, [*loaded.notes, *filter(None, (*notes, note))], data)


def _turns(text: str) -> list[int]:
    words = split_list(text, "--turns")
    numbers = [parse_whole_number(word) or 0 for word in words]
    if 0 in numbers:
        raise ConfigError(f"--turns: {short(words[numbers.index(0)], 80)} is not a turn number (turns count from 1)")
    found = sorted(set(numbers))
    if close := [a for a, b in pairwise(found) if b - a < SAMPLES]:
        raise ConfigError(f"--turns: {close[0]} and the next one must be at least {SAMPLES} turns apart")
    return found


def _streams(
    args: argparse.Namespace,
    configuration: Configuration,
    loaded: LoadedModel,
    size: int,
    kinds: Sequence[str],
    progress: Progress,
) -> tuple[list[Stream], list[str]]:
    """Return the streams to compare, and notes about those that cannot run here."""
    fit, sinks = choose_checked_fit(loaded.model), configuration.settings.num_sink_tokens
    methods = [make_method(kind, size, sinks) for kind in kinds]
    opened = [open_stream(method, loaded.model, fit, native_weights=True) for method in methods]
    others = [at for at, stream in enumerate(opened) if not stream.has_chat_weights]
    if others and any(isinstance(weight, QuantizedMatrix) for weight in loaded.model.parameters()):
        native = load_from_settings(configuration.settings, progress, weights="native").model
        native_fit = choose_checked_fit(native)
        for at in others:
            opened[at] = open_stream(methods[at], native, native_fit)
    streams: list[Stream] = [*opened]
    for chat in streams:
        if isinstance(chat, Chat):
            chat.evict = configuration.settings.evict
    if args.float32:
        whole = load_from_settings(configuration.settings, progress, dtype="float32", weights="native")
        streams.append(open_stream(Method("dense"), whole.model, fit))
        streams[-1].name, streams[-1].description = "dense, float32", f"{streams[-1].description}, in float32"
    if not args.peers:
        return streams, []
    peers, notes = find_peers(gguf_file(configuration, loaded), size, sinks, torch.get_num_threads())
    return [*streams, *peers], notes
