"""Time of a new token, in four ways side by side, or over a long stream.

    python -m tests.decode_speed --model default --cache-size 1024 --tokens 100
    python -m tests.decode_speed --model FOLDER --cache-size 256 --flat 51000

Prints a table and a JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys

from streamchat.chat.decode_bench import measure_decode, measure_flat
from streamchat.models.load import LoadedModel, load_model

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
    args = parser.parse_args()

    def load(weights: str) -> LoadedModel:
        return load_model(args.model, device="cpu", dtype=args.dtype, weights=weights)

    if args.flat:
        times = [1000 * t for t in measure_flat(load(args.weights), cache_size=args.cache_size, tokens=args.flat)]
        early, late = statistics.median(times[slice(*EARLY)]), statistics.median(times[-LATE:])
        print(f"tokens {EARLY[0]} to {EARLY[1]}: {early:.3f} ms, the last {LATE} of {args.flat}: {late:.3f} ms")
        print(json.dumps({"early_ms": early, "late_ms": late, "ratio": late / early}))
        return 0
    figures = measure_decode(
        load, weights=args.weights, cache_size=args.cache_size, tokens=args.tokens, rounds=args.rounds
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
