"""Random chats with turns, stops, failures, undo, pins and resume, checked by an independent oracle after each step.

    python -m tools.random_chats --chats 1000 --seed 0
    python -m tools.random_chats --chats 1 --seed 417        # one of them again

The chat of a seed is the same every time. A fault is printed with its seed, and with the steps that it needs.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.support.random_chats import fault_of
from tests.support.random_plans import Plan, plan, shrunk


def main() -> int:
    """Run the chats; returns 1 if any shows a fault."""
    parser = argparse.ArgumentParser(prog="python -m tools.random_chats", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--chats", type=int, default=100, help="number of chats (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first chat (default: 0)")
    parser.add_argument("--steps", type=int, default=14, help="steps per chat (default: 14)")
    parser.add_argument("--keep-going", action="store_true", help="continue after a fault")
    options = parser.parse_args()
    logging.disable(logging.ERROR)  # failures are part of the plan
    families: Counter[str] = Counter()
    started, compared, faults = time.monotonic(), 0, 0
    for seed in range(options.seed, options.seed + options.chats):
        chosen = plan(seed, options.steps)
        families[chosen.family] += 1
        error, checked = attempt(chosen)
        compared += checked
        if error is not None:
            faults += 1
            report(chosen, error)
            if not options.keep_going:
                break
        done = seed - options.seed + 1
        if done % 25 == 0:
            print(f"{done} chats, {faults} faults, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    chats = sum(families.values())
    print(
        f"{chats} chats ({', '.join(f'{count} {name}' for name, count in sorted(families.items()))}), "
        f"{compared} comparisons of logits, {faults} faults, {time.monotonic() - started:.0f} s"
    )
    return 1 if faults else 0


def attempt(chosen: Plan) -> tuple[Exception | None, int]:
    """Carry a plan out in a folder of its own: its fault, if any, and after how many steps logits were compared."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["STREAMCHAT_HOME"] = str(Path(folder) / "home")  # the user's own folders are not touched
        return fault_of(chosen, Path(folder))


def report(chosen: Plan, error: Exception) -> None:
    """Print a fault, and the fewest steps that show it."""
    print(f"seed {chosen.seed}: {type(error).__name__}: {error}")
    smaller = shrunk(chosen, lambda tried: type(attempt(tried)[0]) is type(error))
    print(smaller)
    print(f"  shows {attempt(smaller)[0]}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
