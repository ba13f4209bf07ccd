"""How long a token takes while other programs keep the processors busy, with different numbers of spins.

    python -m tools.busy --loops 0,4 --spins 300000,1000 --runs 4

Each run is a process of its own: it loads the model, fills the cache, waits until the busy loops have started, and
decodes. Settings take turns, so that a machine that others use treats all alike. Prints milliseconds per token and how
many times the same setting's median at rest they are.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

REST = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or be one of the runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loops", default="0,2,4,6", help="numbers of busy loops (default: %(default)s)")
    parser.add_argument("--spins", default="300000,1000", help="values of GOMP_SPINCOUNT (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=4, help="runs of each setting (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=60, help="tokens per run (default: %(default)s)")
    parser.add_argument("--model", default="default")
    parser.add_argument("--cache-size", type=int, default=1024)
    parser.add_argument("--one-run", type=int, default=None, metavar="LOOPS", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one_run is not None:
        print(json.dumps(run(args.model, args.cache_size, args.tokens, args.one_run)))
        return 0
    counts = [int(text) for text in args.loops.split(",")]
    found: dict[tuple[str, int], list[list[float]]] = defaultdict(list)
    for _ in range(args.runs):
        for loops in counts:
            for spins in args.spins.split(","):
                command = [sys.executable, "-m", "tools.busy", "--one-run", str(loops), "--tokens", str(args.tokens)]
                command += ["--model", args.model, "--cache-size", str(args.cache_size)]
                environment = os.environ | {"GOMP_SPINCOUNT": spins}
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                found[spins, loops].append(json.loads(done.stdout.splitlines()[-1]))
    for (spins, loops), runs in found.items():
        means = [statistics.mean(run) for run in runs]
        rest = [token for run in found.get((spins, REST), runs) for token in run]
        times = max(means) / statistics.median(rest)
        print(
            f"{spins:>7} spins, {loops} busy loops: ms per token, mean of each run "
            f"{' '.join(f'{mean:.1f}' for mean in means)}; the worst run {times:.1f} x the median at rest"
        )
    return 0


def run(model: str, cache_size: int, tokens: int, loops: int) -> list[float]:
    """Milliseconds of each of `tokens` tokens on a full cache, while `loops` processes compute without end."""
    from streamchat.benchmarks.decode import EndlessReply
    from streamchat.models.load import load_model

    stream = EndlessReply(load_model(model, device="cpu", weights="auto"), cache_size)
    stream.decode(8)
    with busy(loops):
        return [1000 * seconds for seconds in stream.decode(tokens)]


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """Run `loops` processes that never wait."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_spin, daemon=True) for _ in range(loops)]
    for worker in workers:
        worker.start()
    time.sleep(1.0 if workers else 0.0)
    try:
        yield
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _spin() -> None:
    while True:
        pass


if __name__ == "__main__":
    sys.exit(main())
