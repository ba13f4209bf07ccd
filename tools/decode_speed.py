"""Time of a new token, in four ways side by side, or over a long stream.

    python -m tools.decode_speed --model default --cache-size 1024 --tokens 100
    python -m tools.decode_speed --model FOLDER --cache-size 256 --flat 51000
    python -m tools.decode_speed --threads 1 --cpu-time --profile

Prints a table and a JSON line. On a machine that others use, too, `--threads 1 --cpu-time` counts the time that one
thread really ran.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import torch
from torch.profiler import ProfilerActivity, profile

from streamchat.models.load import LoadedModel, load_model
from tools.decode_bench import compiled_step, full_stream, measure_decode, measure_flat, measure_parts

EARLY = (2000, 3000)
LATE = 1000
"""The last tokens of a long stream are compared with those of EARLY."""


def main() -> int:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--cache-size", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--flat", type=int, default=0, metavar="TOKENS")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--cpu-time", action="store_true", help="time that this thread ran; with --threads 1")
    parser.add_argument("--profile", action="store_true", help="where the time of a token goes, by operation")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    clock = time.thread_time if args.cpu_time else time.perf_counter

    def load(weights: str) -> LoadedModel:
        return load_model(args.model, device="cpu", dtype=args.dtype, weights=weights)

    if args.profile:
        stream = full_stream(load(args.weights), cache_size=args.cache_size)
        if (step := compiled_step(stream.model)) is not None:
            for name, each in measure_parts(stream, step, args.tokens).items():
                print(f"{name:<55}{each:8.3f} ms")
            return 0
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            stream.decode(args.tokens)
        print(f"per token, of {args.tokens}:")
        rows = sorted(profiled.key_averages(), key=lambda row: -row.self_cpu_time_total)
        for row in rows[:20]:
            each = row.self_cpu_time_total / 1000 / args.tokens
            print(f"{row.key:<55}{each:8.3f} ms {row.count / args.tokens:8.1f} calls")
        return 0
    if args.flat:
        found = measure_flat(load(args.weights), cache_size=args.cache_size, tokens=args.flat, clock=clock)
        times = [1000 * seconds for seconds in found]
        early, late = statistics.median(times[slice(*EARLY)]), statistics.median(times[-LATE:])
        print(f"tokens {EARLY[0]} to {EARLY[1]}: {early:.3f} ms, the last {LATE} of {args.flat}: {late:.3f} ms")
        print(json.dumps({"early_ms": early, "late_ms": late, "ratio": late / early}))
        return 0
    figures = measure_decode(
        load,
        weights=args.weights,
        cache_size=args.cache_size,
        tokens=args.tokens,
        rounds=args.rounds,
        clock=clock,
    )
    rows = [
        (f"engine, {figures.weights} weights", figures.engine_ms),
        ("engine, native weights", figures.native_ms),
        (f"transformers' forward, {figures.weights} weights", figures.plain_ms),
        ("transformers' forward, native weights", figures.plain_native_ms),
    ]
    for name, ms in rows:
        print(f"{name:<44}{ms:8.2f} ms {1000 / ms:8.1f} tok/s {figures.plain_native_ms / ms:6.2f} x")
    print(f"prefill {figures.prefill_tps:.0f} tok/s, with native weights {figures.prefill_native_tps:.0f}")
    print(json.dumps(figures.as_dict()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
