"""`streamchat bench --gpu`: speed against transformers' `generate`, the limit of the bandwidth, and VRAM over time.

The limit: each new token reads every weight and every cached key and value once, so at most as many tokens per second
are possible as the bandwidth allows. The bandwidth is measured by copying.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from streamchat.base.errors import StreamchatError
from streamchat.base.eviction_policies import DEFAULT_POLICY
from streamchat.benchmarks.methods import Generate, Method, Streamchat
from streamchat.benchmarks.workloads import LATE, measure_decode
from streamchat.models.checked_fit import choose_checked_fit
from streamchat.models.load import LoadedModel
from streamchat.telemetry.memory import device_memory
from streamchat.verify.text import help_topic_ids

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

    model: str
    device: str
    gpu: str
    dtype: str
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


def read_memory(method: Method, prompt: list[int], marks: list[int], device: str) -> list[MemoryReading]:
    """Run prompts and replies alternately; read memory and speed after each number of tokens in `marks`."""
    found = []
    method.start()
    processed = 0
    for mark in marks:
        milliseconds = 0.0
        while processed < mark:
            token = method.prefill(prompt)
            milliseconds = 1000 * statistics.median(method.decode_timed(token, REPLY))
            processed += PROMPT + REPLY
        memory = device_memory(device)
        allocated, reserved = (memory.allocated, memory.reserved) if memory else (None, None)
        found.append(MemoryReading(processed, allocated, reserved, method.kv_bytes, milliseconds))
    method.close()
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
    ours = Streamchat(model, choose_checked_fit(model), cache_size, num_sink_tokens, evict)
    theirs = Generate(model)
    decode = measure_decode([ours, theirs], ids[: LATE * cache_size], cache_size, tokens, rounds, progress, device)
    for name, figures in decode.items():
        if figures.failure:
            raise StreamchatError(f"{name} failed: {figures.failure}")
    progress(f"Reading VRAM up to {until:,} tokens")
    readings = read_memory(ours, ids[:PROMPT], sorted({min(EARLY, until), until}), device)
    engine, generate = decode[ours.name], decode[theirs.name]
    return GpuFigures(
        model=loaded.name,
        device=device,
        gpu=torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        dtype=loaded.dtype,
        cache_size=cache_size,
        engine_tps=1000 / statistics.median(engine.late_ms),
        generate_tps=1000 / statistics.median(generate.early_ms),
        generate_late_tps=1000 / statistics.median(generate.late_ms),
        prefill_tps=statistics.median(engine.prefill_tps),
        generate_prefill_tps=statistics.median(generate.prefill_tps),
        bandwidth=bandwidth,
        token_bytes=weight_bytes_per_token(model) + cache_size * ours._cache.token_bytes,
        readings=readings,
    )


def as_text(figures: GpuFigures) -> str:
    """Return the figures as a table."""
    f = figures
    rows = [
        f"{f.model}, {f.dtype} on {f.gpu}, budget {f.cache_size:,} tokens",
        f"{'engine':<32}{f.engine_tps:10.1f} tok/s  {f.engine_tps / f.generate_tps:6.2f} x generate",
        f"{f'generate, {f.cache_size:,} cached':<32}{f.generate_tps:10.1f} tok/s",
        f"{f'generate, {LATE * f.cache_size:,} cached':<32}{f.generate_late_tps:10.1f} tok/s",
        f"{'limit of the bandwidth':<32}{f.limit_tps:10.1f} tok/s  {f.engine_tps / f.limit_tps:6.1%} of it reached",
        f"{'bandwidth, measured':<32}{f.bandwidth / 1e9:10.1f} GB/s   {f.token_bytes / 1e6:,.1f} MB per token",
        f"{'prefill, engine / generate':<32}{f.prefill_tps:10.0f} / {f.generate_prefill_tps:.0f} tok/s",
    ]
    for reading in f.readings:
        memory = "n/a (on CPU)" if reading.allocated is None else f"{reading.allocated / 1e6:,.2f} MB allocated"
        reserved = "" if reading.reserved is None else f", {reading.reserved / 1e6:,.1f} MB reserved"
        name = f"VRAM after {reading.processed:,} tokens"
        rows.append(f"{name:<32}  {memory}{reserved}; {reading.token_ms:.2f} ms per token")
    return "\n".join(rows)
