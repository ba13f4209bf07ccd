"""`streamchat bench --gpu`: speed against transformers' `generate`, the limit of the bandwidth, and VRAM over time.

The limit: each new token reads every weight and every cached key and value once, so at most as many tokens per second
are possible as the bandwidth allows. The bandwidth is measured by copying.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from streamchat.base.devices import device_type, is_spread
from streamchat.base.errors import ConfigError, StreamchatError
from streamchat.base.eviction_policies import DEFAULT_POLICY
from streamchat.base.progress import Progress
from streamchat.benchmarks.loading import about, cache_size, device_name, heading
from streamchat.benchmarks.methods.growing import Dense
from streamchat.benchmarks.methods.registry import Method, make_method
from streamchat.benchmarks.methods.stream import Stream
from streamchat.benchmarks.methods.streaming import Chat
from streamchat.benchmarks.workloads import LATE, measure_decode
from streamchat.config.loader import Configuration
from streamchat.models.checked_fit import choose_checked_fit
from streamchat.models.load import LoadedModel, load_from_settings
from streamchat.models.quiet import quiet
from streamchat.reports.page import Page, Table, facts
from streamchat.telemetry.memory import memory_state
from streamchat.verify.text import help_topic_ids

UNTIL = 100_000
"""Default of `--until`."""
EARLY = 2_000
"""Tokens processed at the first reading of memory."""
PROMPT, REPLY = 448, 64
"""Tokens prefilled and decoded alternately up to the last reading."""
COPIED = 1 << 30
"""Bytes per copy, far more than any cache of the chip."""


@dataclass(frozen=True)
class MemoryReading:
    """Memory and speed of a stream after `processed` tokens."""

    processed: int
    allocated: int | None
    """Device memory in live tensors; None on a CPU."""
    reserved: int | None
    kv_bytes: int
    token_ms: float
    """Median milliseconds per token of the latest reply."""


@dataclass(frozen=True)
class GpuFigures:
    """All measurements, with a full cache of `cache_size` tokens."""

    gpu: str
    cache_size: int
    engine_tps: float
    """Tokens per second of the engine after `LATE` budgets of text."""
    generate_tps: float
    """Tokens per second of transformers' `generate` after one budget of text: as many cached tokens as the engine."""
    generate_late_tps: float
    """Tokens per second of `generate` after `LATE` budgets: its cache has grown."""
    prefill_tps: float
    generate_prefill_tps: float
    bandwidth: float
    """Bytes per second, read and written."""
    token_bytes: int
    """Bytes that one token reads: weights, keys and values."""
    readings: list[MemoryReading]

    @property
    def limit_tps(self) -> float:
        """Tokens per second that the bandwidth allows."""
        return self.bandwidth / self.token_bytes

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return asdict(self) | {"limit_tps": self.limit_tps, "share_of_limit": self.engine_tps / self.limit_tps}


def run(args: argparse.Namespace, configuration: Configuration, progress: Progress) -> Page:
    """Measure one GPU.

    Raises:
        ConfigError: There is no GPU, or another device or quantized weights are set.
        ModelError: The model cannot be loaded, or cannot stream.
        StreamchatError: The engine or `generate` failed.
    """
    settings = configuration.settings
    if settings.weights not in ("auto", "native"):
        raise ConfigError(f"--gpu measures native weights and weights = {settings.weights}; add --weights native")
    device = _cuda_device(settings.device)
    loaded = load_from_settings(settings, progress, device=device, weights="native")
    if is_spread(loaded.device):
        raise ConfigError(f"--gpu measures one GPU and the layers are on {loaded.device}; choose one with --device")
    with quiet():
        figures = measure(
            loaded,
            cache_size=cache_size(configuration, loaded)[0],
            num_sink_tokens=settings.num_sink_tokens,
            evict=settings.evict,
            tokens=args.new_tokens,
            rounds=args.rounds,
            until=args.until or UNTIL,
            progress=progress,
        )
    lines = heading(loaded, f"budget {figures.cache_size:,} tokens")
    data = about("bench", loaded) | figures.as_dict()
    return Page("bench-gpu", "One GPU", lines, tables_of(figures), notes=[*loaded.notes], data=data)


def _cuda_device(device: str) -> str:
    """Return the GPU for `--gpu`: the first one for `auto`.

    Raises:
        ConfigError: PyTorch finds no GPU, or the setting names another device.
    """
    if not torch.cuda.is_available():
        raise ConfigError("--gpu measures a GPU and PyTorch finds none here; use --decode to measure the CPU")
    if device != "auto" and device_type(device) != "cuda":
        raise ConfigError(f"--gpu measures a GPU and device = {device}; add --device cuda")
    return "cuda" if device == "auto" else device


def copy_bandwidth(device: str, size: int = COPIED, rounds: int = 10) -> float:
    """Return the bytes per second that a copy of `size` bytes reads and writes on `device`; the best of `rounds`."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(rounds + 1):  # the first round also loads the kernel
        started = time.perf_counter()
        target.copy_(source)
        target[-1].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size / best


def weight_bytes_per_token(model: Any) -> int:
    """Return the bytes of weights that one token reads: all of them, except an embedding table that is not tied."""
    weights = {p.data_ptr(): p for p in model.parameters()}
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if table.data_ptr() != head.data_ptr():
        weights.pop(table.data_ptr(), None)
    return sum(p.nbytes for p in weights.values())


def read_memory(stream: Stream, prompt: list[int], marks: list[int], device: str) -> list[MemoryReading]:
    """Run prompts and replies alternately; read memory and speed after each number of tokens in `marks`."""
    found = []
    processed = 0
    with stream:
        for mark in marks:
            milliseconds = 0.0
            while processed < mark:
                token = stream.prefill(prompt)
                milliseconds = 1000 * statistics.median(stream.decode_timed(token, REPLY))
                processed += PROMPT + REPLY
            memory = memory_state(device)
            allocated, reserved = memory.allocated_bytes, memory.reserved_bytes
            found.append(MemoryReading(processed, allocated, reserved, stream.kv_bytes, milliseconds))
    return found


def measure(
    loaded: LoadedModel,
    *,
    cache_size: int = 1024,
    num_sink_tokens: int = 4,
    evict: str = DEFAULT_POLICY,
    tokens: int = 100,
    rounds: int = 3,
    until: int = 100_000,
    copied: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> GpuFigures:
    """Measure one model with native weights.

    Args:
        loaded: A model on one device.
        cache_size: Budget in tokens.
        num_sink_tokens: First tokens, which are never evicted.
        evict: The eviction policy of the engine.
        tokens: Tokens timed after one budget and after `LATE` budgets of text, in each round.
        rounds: Rounds of the engine and `generate` in turn, after one warm-up round.
        until: Tokens processed at the last reading of memory.
        copied: Bytes of the copy that measures the bandwidth; None = `COPIED`.
        progress: Called with progress messages.

    Raises:
        StreamchatError: The engine or `generate` failed.
    """
    model, device = loaded.model, loaded.device
    progress("Measuring the bandwidth")
    bandwidth = copy_bandwidth(device, copied or COPIED)
    ids = help_topic_ids(loaded.tokenizer, LATE * cache_size + PROMPT)
    ids = ids * -(-LATE * cache_size // len(ids))  # the text is shorter than a very large budget
    fit = choose_checked_fit(model)
    ours = Chat(make_method("streamchat", cache_size, num_sink_tokens), model, fit)
    ours.evict = evict
    theirs = Dense(Method("dense"), model, fit)
    decode = measure_decode([ours, theirs], ids[: LATE * cache_size], cache_size, tokens, rounds, progress, device)
    for name, figures in decode.items():
        if figures.failure:
            raise StreamchatError(f"{name} failed: {figures.failure}")
    progress(f"Reading VRAM up to {until:,} tokens")
    readings = read_memory(ours, ids[:PROMPT], sorted({min(EARLY, until), until}), device)
    engine, generate = decode[ours.name], decode[theirs.name]
    return GpuFigures(
        gpu=device_name(device),
        cache_size=cache_size,
        engine_tps=1000 / statistics.median(engine.late_ms),
        generate_tps=1000 / statistics.median(generate.early_ms),
        generate_late_tps=1000 / statistics.median(generate.late_ms),
        prefill_tps=statistics.median(engine.prefill_tps),
        generate_prefill_tps=statistics.median(generate.prefill_tps),
        bandwidth=bandwidth,
        token_bytes=weight_bytes_per_token(model) + cache_size * ours.token_bytes,
        readings=readings,
    )


def tables_of(figures: GpuFigures) -> list[Table]:
    """Return speed and memory as tables."""
    f = figures
    speed = {
        "engine": f"{f.engine_tps:.1f} tok/s, {f.engine_tps / f.generate_tps:.2f} x generate",
        f"generate, {f.cache_size:,} cached": f"{f.generate_tps:.1f} tok/s",
        f"generate, {LATE * f.cache_size:,} cached": f"{f.generate_late_tps:.1f} tok/s",
        "limit of the bandwidth": f"{f.limit_tps:.1f} tok/s, {f.engine_tps / f.limit_tps:.1%} of it reached",
        "bandwidth, measured": f"{f.bandwidth / 1e9:.1f} GB/s, {f.token_bytes / 1e6:,.1f} MB per token",
        "prefill, engine": f"{f.prefill_tps:.0f} tok/s",
        "prefill, generate": f"{f.generate_prefill_tps:.0f} tok/s",
    }
    rows = [
        (f"{each.processed:,}", _mb(each.allocated), _mb(each.reserved), f"{each.token_ms:.2f}") for each in f.readings
    ]
    columns = ("tokens processed", "MB allocated", "MB reserved", "ms per token")
    return [facts("Speed", speed), Table("Memory over the stream", columns, rows)]


def _mb(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:,.2f}"
