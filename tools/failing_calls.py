"""Fails the n-th call of each kind while a chat runs, for each n, and checks each time that nothing is half done.

    python -m tools.failing_calls [--cases 500] [--seed 0] [--all [--failures NAMES] [--first N]]

A chat with a tiny model, and commands around it (`tools/disk/scenario.py`), run again and again. In each run, one
`open`, `write`, `fsync`, `rename`, `mmap`, `ftruncate`, `unlink`, `mkdir`, or `link` in the home folder fails with
ENOSPC, EIO, EMFILE, or ENOMEM. Or all of these calls fail until the end of the next step, as on a full disk on which
room is made later. Every failure must be reported in one sentence without a traceback, the chat must continue, and at
the end everything must be saved, or have been reported as not saved. With `--all`, n counts up until a run has no
such call. Linux only; needs a C compiler.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tools.disk import shim

MAX_FAULTS = 30
"""The run ends after this many."""


@dataclass
class Outcome:
    """The result of all runs."""

    cases: int = 0
    unmet: int = 0
    """Cases that had fewer calls than the number that was to fail."""
    failures: Counter[str] = field(default_factory=Counter)
    silent: int = 0
    """Cases whose failure needed no word: what failed was not needed, or was done again."""
    faults: list[str] = field(default_factory=list)


def ensure_preloaded() -> None:
    """Start this process again with the library preloaded, unless it is."""
    try:
        shim.Shim()
    except RuntimeError:
        folder = Path(tempfile.mkdtemp(prefix="streamchat-shim-"))
        environment = shim.environment(shim.build(folder), folder)
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def run(
    folder: Path,
    cases: int | None,
    seed: int,
    say: Callable[[str], None] = lambda text: None,
    *,
    each: int = 1,
    first: int = 0,
    failures: Collection[str] = (),
    verbose: bool = False,
) -> Outcome:
    """Run cases in the preloaded process.

    Args:
        folder: An empty folder, best in memory.
        cases: Number of cases, drawn at random; None for every n.
        seed: Of the draw.
        say: Takes a line for each fault, and from time to time the progress.
        each: With every n: take only each so many-th.
        first: With every n: the first one.
        failures: Names of the failures, such as "write EIO"; all of them if empty.
        verbose: Say what the user was told in each case.
    """
    from tests.support.real_engine import tiny_loaded
    from tools.disk.faults import FAILURES, Attempts, Case

    attempts, outcome = Attempts(tiny_loaded(), tiny_loaded(), folder), Outcome()
    wanted = [failure for failure in FAILURES if not failures or failure.name in failures]

    def take(case: Case) -> bool:
        result = attempts.run(case)
        outcome.cases += 1
        outcome.unmet += not result.failed
        if result.failed:
            outcome.failures[case.failure.name] += 1
            outcome.silent += not result.told
        if result.fault:
            outcome.faults.append(result.fault)
            say(result.fault)
        if outcome.cases % 25 == 0:
            say(f"{outcome.cases} cases")
        if verbose:
            say(f"{case}: {result.call or 'no such call'}; told: {list(result.told)}")
        return result.failed > 0

    if cases is None:
        for failure in wanted:
            for number in count(first + seed % each, each):
                met = [take(Case(failure, number, lasting)) for lasting in (False, True)]
                if not any(met) or len(outcome.faults) >= MAX_FAULTS:
                    break
        return outcome
    rng = random.Random(seed)
    for _ in range(cases):
        failure = rng.choice(wanted)
        take(Case(failure, rng.randrange(attempts.calls[failure.kind]), rng.random() < 0.5))
        if len(outcome.faults) >= MAX_FAULTS:
            break
    return outcome


def main() -> int:
    """Run the cases and print the results; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=500, help="number of random cases (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="fail every call of every kind instead")
    parser.add_argument("--each", type=int, default=1, help="with --all: fail only every N-th call")
    parser.add_argument("--first", type=int, default=0, help="with --all: start at this call of each kind")
    parser.add_argument(
        "--failures", default="", help='only these, separated by commas, such as "write EIO,map ENOMEM"'
    )
    parser.add_argument("--verbose", action="store_true", help="print what the user is told in each case")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    ensure_preloaded()
    from tools.disk.faults import FAILURES  # imports torch

    failures = [name.strip() for name in args.failures.split(",") if name.strip()]
    if unknown := sorted({*failures} - {failure.name for failure in FAILURES}):
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(failure.name for failure in FAILURES)}")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=shim.work_folder()) as folder:
        outcome = run(
            Path(folder),
            None if args.all else args.cases,
            args.seed,
            lambda text: print(text, file=sys.stderr, flush=True),
            each=args.each,
            first=args.first,
            failures=failures,
            verbose=args.verbose,
        )
    met = outcome.cases - outcome.unmet
    print(
        f"{outcome.cases} runs of a chat in {time.perf_counter() - started:.0f} s, {met} of them "
        f"with a call that failed ({outcome.silent} needed no word to the user): {len(outcome.faults)} faults"
    )
    for name, times in outcome.failures.most_common():
        print(f"{times:8} {name}")
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
