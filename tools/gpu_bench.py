"""A GPU measured: tokens a second beside transformers' `generate` and the limit of its memory, and whether VRAM stays.

    python -m tools.gpu_bench --model default
    python -m tools.gpu_bench --model FOLDER --dtype float16 --cache-size 4096 --until 20000

Prints a table and a JSON line. The limit: each new token reads every weight and every cached key and value once, so
that no more tokens a second are possible than these bytes go into the bandwidth, which is measured by copying.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from streamchat.base.devices import is_spread
from streamchat.base.errors import StreamchatError
from streamchat.benchmarks.methods import Generate, Method, Streamchat
from streamchat.benchmarks.workloads import LATE, measure_decode
from streamchat.models.checked_fit import choose_checked_fit
from streamchat.models.load import LoadedModel, load_model
from streamchat.telemetry.memory import device_memory
from streamchat.verify.text import help_topic_ids

EARLY = 2_000
"""Tokens said at the first look at memory."""
PROMPT, REPLY = 448, 64
"""Tokens read and written in turn on the way to the last look."""
COPIED = 1 << 30
"""Bytes, far beyond any cache of the chip."""


@dataclass(frozen=True)
class Look:
    """A stream after `said` tokens."""

    said: int
    allocated: int | None
    """Device memory in live tensors; None on a CPU."""
    reserved: int | None
    kv_bytes: int
    token_ms: float
    """Median of the latest reply."""


@dataclass(frozen=True)
class Figures:
    """Everything that was measured, at a full cache of `cache_size` tokens."""

    model: str
    device: str
    gpu: str
    dtype: str
    cache_size: int
    engine_tps: float
    """Tokens a second of the chat's own path behind `LATE` budgets of text."""
    generate_tps: float
    """Of transformers' `generate` behind one budget of text, where it holds as many tokens as the engine."""
    generate_late_tps: float
    """The same behind `LATE` budgets: its cache has grown."""
    prefill_tps: float
    generate_prefill_tps: float
    bandwidth: float
    """Bytes a second, read and written ones together."""
    token_bytes: int
    """Read for one token: weights, keys and values."""
    looks: list[Look]

    @property
    def limit_tps(self) -> float:
        """Tokens a second that the memory allows."""
        return self.bandwidth / self.token_bytes

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"limit_tps": self.limit_tps, "share_of_limit": self.engine_tps / self.limit_tps}


def copy_bandwidth(device: str, size: int = COPIED, rounds: int = 10) -> float:
    """Bytes a second that a copy of `size` bytes reads and writes on `device`, at best of `rounds`."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(rounds + 1):  # the first one also pays for the start of the kernel
        started = time.perf_counter()
        target.copy_(source)
        target[-1].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size / best


def weight_bytes_per_token(model: Any) -> int:
    """Bytes of weights that one new token reads: all, but one row only of a table of embeddings that is not tied."""
    weights = {p.data_ptr(): p for p in model.parameters()}
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if table.data_ptr() != head.data_ptr():
        weights.pop(table.data_ptr(), None)
    return sum(p.nbytes for p in weights.values())


def talk(method: Method, prompt: list[int], marks: list[int], device: str) -> list[Look]:
    """A stream of prompts and replies in turn, looked at where it passes each of `marks` tokens."""
    found = []
    method.start()
    said = 0
    for mark in marks:
        milliseconds = 0.0
        while said < mark:
            token = method.prefill(prompt)
            milliseconds = 1000 * statistics.median(method.decode_timed(token, REPLY))
            said += PROMPT + REPLY
        memory = device_memory(device)
        allocated, reserved = (memory.allocated, memory.reserved) if memory else (None, None)
        found.append(Look(said, allocated, reserved, method.kv_bytes, milliseconds))
    method.close()
    return found


def measure(
    loaded: LoadedModel,
    *,
    cache_size: int = 1024,
    tokens: int = 100,
    rounds: int = 3,
    until: int = 100_000,
    copied: int = COPIED,
    progress: Callable[[str], None] = lambda _: None,
) -> Figures:
    """All figures of one model with its own weights.

    Args:
        loaded: On one device.
        cache_size: Budget in tokens.
        tokens: Timed at each of two places, in each of `rounds`.
        rounds: Engine and `generate` in turn, after a round that warms up.
        until: Tokens said at the last look at memory.
        copied: Bytes of the copy that measures the bandwidth.
        progress: Told what is going on.
    """
    model, device = loaded.model, loaded.device
    progress("Bandwidth")
    bandwidth = copy_bandwidth(device, copied)
    ids = help_topic_ids(loaded.tokenizer, LATE * cache_size + PROMPT)
    ids = ids * -(-LATE * cache_size // len(ids))  # the text is shorter than a very large budget
    ours, theirs = Streamchat(model, choose_checked_fit(model), cache_size, 4), Generate(model)
    decode = measure_decode([ours, theirs], ids[: LATE * cache_size], cache_size, tokens, rounds, progress, device)
    for name, figures in decode.items():
        if figures.failure:
            raise RuntimeError(f"{name}: {figures.failure}")
    progress(f"VRAM up to {until:,} tokens")
    looks = talk(ours, ids[:PROMPT], sorted({min(EARLY, until), until}), device)
    engine, generate = decode[ours.name], decode[theirs.name]
    return Figures(
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
        looks=looks,
    )


def table(figures: Figures) -> str:
    """For people."""
    f = figures
    rows = [
        f"{f.model}, {f.dtype} on {f.gpu}, budget {f.cache_size:,} tokens",
        f"{'engine':<32}{f.engine_tps:10.1f} tok/s  {f.engine_tps / f.generate_tps:6.2f} x generate",
        f"{f'generate, {f.cache_size:,} cached':<32}{f.generate_tps:10.1f} tok/s",
        f"{f'generate, {LATE * f.cache_size:,} cached':<32}{f.generate_late_tps:10.1f} tok/s",
        f"{'limit of the memory':<32}{f.limit_tps:10.1f} tok/s  {f.engine_tps / f.limit_tps:6.1%} of it reached",
        f"{'bandwidth, measured':<32}{f.bandwidth / 1e9:10.1f} GB/s   {f.token_bytes / 1e6:,.1f} MB a token",
        f"{'prefill, engine / generate':<32}{f.prefill_tps:10.0f} / {f.generate_prefill_tps:.0f} tok/s",
    ]
    for look in f.looks:
        memory = "n/a (on CPU)" if look.allocated is None else f"{look.allocated / 1e6:,.2f} MB allocated"
        reserved = "" if look.reserved is None else f", {look.reserved / 1e6:,.1f} MB reserved"
        name = f"VRAM after {look.said:,} tokens"
        rows.append(f"{name:<32}  {memory}{reserved}; {look.token_ms:.2f} ms a token")
    return "\n".join(rows)


def main(argv: list[str]) -> int:
    """Measure, or say why not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--device", default="cuda", help="cuda, or a GPU by number (cuda:1)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--cache-size", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--until", type=int, default=100_000, metavar="TOKENS")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(
            "This measures a GPU, and torch finds none here; tools.decode_speed measures the CPU's decode step",
            file=sys.stderr,
        )
        return 2
    try:
        loaded = load_model(args.model, device=args.device, dtype=args.dtype, weights="native")
    except StreamchatError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if is_spread(loaded.device):
        print(f"The bandwidth is that of one GPU and the layers are on {loaded.device}; choose one", file=sys.stderr)
        return 2
    figures = measure(
        loaded,
        cache_size=args.cache_size,
        tokens=args.tokens,
        rounds=args.rounds,
        until=args.until,
        progress=lambda stage: print(stage, file=sys.stderr),
    )
    print(table(figures))
    print(json.dumps(figures.as_dict()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
