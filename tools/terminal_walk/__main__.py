"""Walk at random through the app and the prompt on a pseudo-terminal, and check the screen after every step.

    python -m tools.terminal_walk --seed 7 --steps 400 [--front-end app] [--walks 10]

A tiny random model replies. Steps are messages, commands, pastes, keys, resizes, probes, quits followed by a resume,
and SIGTERM. The following must hold:

- the exit code is 0, or 143 after SIGTERM;
- the screen never shows more cached tokens than the budget;
- the start of the model's context never moves back, except after a command that restores tokens, such as /undo;
- a typed word is on the screen within --limit seconds of CPU time, also if it was typed before the first paint;
- after the end, the terminal is as it was before.

A seed always gives the same steps, but not at the same moments of a reply. Further walks use the next seeds.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.fuzz.workplace import workplace
from tools.terminal_walk.steps import FRONT_ENDS, FrontEnd, steps
from tools.terminal_walk.walk import Walk, WalkError


def main(argv: Sequence[str] | None = None) -> int:
    """Take the walks; return 1 if something does not hold, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.terminal_walk", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the first walk (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="steps of a walk (default: %(default)s)")
    parser.add_argument("--walks", type=int, default=1, help="number of walks (default: %(default)s)")
    parser.add_argument("--front-end", choices=("app", "prompt", "both"), default="both")
    parser.add_argument("--limit", type=float, default=2.0, help="CPU seconds until a typed word is shown (default: 2)")
    args = parser.parse_args(argv)
    front_ends = [name for name in FRONT_ENDS if args.front_end in (name, "both")]
    failures = 0
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    for seed in range(args.seed, args.seed + args.walks):
        for front_end in front_ends:
            failures += not _walk(front_end, seed, args.steps, args.limit)
    return int(failures > 0)


def _walk(front_end: FrontEnd, seed: int, count: int, limit_s: float) -> bool:
    """Take one walk, print a line about it, and return whether everything held."""
    where = f"{front_end}, seed {seed}, {count} steps"
    with workplace() as folder:
        walk = Walk(front_end, write_model(folder / "model"), limit_s)
        try:
            walk.take(steps(seed, count, front_end))
        except WalkError as error:
            print(f"{where}: {error}", flush=True)
            return False
    found = walk.findings
    taken = ", ".join(f"{number} {kind}" for kind, number in sorted(found.taken.items()))
    print(f"{where}: held ({taken}; slowest word {found.slowest_s:.2f} s, {found.typed_again} twice)", flush=True)
    return True


def write_model(folder: Path) -> Path:
    """Write a tiny random model, and return its folder."""
    from streamchat.models.quiet import quiet
    from tests.support.models_help import save, tiny_llama

    with quiet():
        return save(tiny_llama(max_position_embeddings=2048), folder)


if __name__ == "__main__":
    sys.exit(main())
