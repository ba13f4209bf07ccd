"""The page of `streamchat bench --decode`."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from typing import Any

import torch

from streamchat.base.devices import device_type
from streamchat.base.errors import ConfigError
from streamchat.base.progress import Progress
from streamchat.benchmarks import decode
from streamchat.benchmarks.decode_profile import profile_token
from streamchat.benchmarks.loading import about, cache_size, heading
from streamchat.config.loader import Configuration
from streamchat.models.load import load_from_settings
from streamchat.models.quiet import quiet
from streamchat.reports.page import Page, Table


def run(args: argparse.Namespace, configuration: Configuration, progress: Progress) -> Page:
    """Measure the decode step on the CPU.

    Raises:
        ConfigError: Another device is set, or `--flat` is too short.
        ModelError: The model cannot be loaded, or cannot stream.
    """
    settings = configuration.settings
    if device_type(settings.device) not in ("auto", "cpu"):
        raise ConfigError(f"--decode measures the CPU and device = {settings.device}; add --device cpu, or use --gpu")
    if args.flat is not None and args.flat < decode.MIN_FLAT:
        raise ConfigError(f"--flat {args.flat} must be at least {decode.MIN_FLAT}")
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or before)
    try:
        with quiet():
            return _page(args, configuration, progress)
    finally:
        torch.set_num_threads(before)


def _page(args: argparse.Namespace, configuration: Configuration, progress: Progress) -> Page:
    tokens, clock = args.rounds * args.new_tokens, time.thread_time if args.cpu_time else time.perf_counter
    loaded = load_from_settings(configuration.settings, progress, device="cpu")
    settings = configuration.settings
    size = cache_size(configuration, loaded)[0]
    chat: dict[str, Any] = {"num_sink_tokens": settings.num_sink_tokens, "evict": settings.evict, "clock": clock}
    page = Page("bench-decode", "Decoding on the CPU", heading(loaded, f"{size:,} cached tokens"))
    page.notes += loaded.notes
    figures: dict[str, Any]
    if args.profile or args.flat:
        stream = decode.EndlessReply(loaded, size, **chat)
        progress(f"Decoding {args.flat or tokens:,} tokens")
    if args.profile:
        parts = profile_token(stream, tokens)
        rows = [(name, f"{ms:.3f}") for name, ms in parts.items()]
        page.tables.append(Table("Where the time of a token goes", ("", "ms per token"), rows))
        figures = {"ms": parts}
    elif args.flat:
        flat = decode.compare_ends(stream.decode(args.flat))
        page.tables.append(_ends(flat))
        figures = asdict(flat)
    else:
        native = load_from_settings(configuration.settings, progress, device="cpu", weights="native")
        progress(f"Decoding {tokens:,} tokens in each of four configurations")
        step = decode.measure_step(loaded, native, cache_size=size, **chat, tokens=tokens, rounds=args.rounds)
        page.tables.append(_step(step))
        figures = asdict(step)
    page.data = about("bench", loaded) | figures
    return page


def _step(figures: decode.StepFigures) -> Table:
    """Return one row per configuration; the last column is the speedup over transformers on native weights."""
    times = {
        f"engine, {figures.weights} weights": figures.engine_ms,
        "engine, native weights": figures.native_ms,
        f"transformers' forward pass, {figures.weights} weights": figures.plain_ms,
        "transformers' forward pass, native weights": figures.plain_native_ms,
    }
    rows = [(n, f"{ms:.2f}", f"{1000 / ms:.1f}", f"{figures.plain_native_ms / ms:.2f} x") for n, ms in times.items()]
    prefill = f"Prefill: {figures.prefill_tps:.0f} tok/s, with native weights {figures.prefill_native_tps:.0f} tok/s."
    return Table("One token on a full cache", ("", "ms per token", "tok/s", "speedup"), rows, prefill)


def _ends(figures: decode.FlatFigures) -> Table:
    early = f"{decode.EARLY.start:,} to {decode.EARLY.stop:,}"
    last = f"the last {-decode.LATE.start:,} of {figures.tokens:,}"
    rows = [(early, f"{figures.early_ms:.3f}", ""), (last, f"{figures.late_ms:.3f}", f"{figures.ratio:.3f} x")]
    return Table("One long reply", ("tokens", "ms per token", "late / early"), rows)
