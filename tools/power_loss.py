"""Simulates power failures at every moment of a chat, and opens the remaining files with streamchat.

    python -m tools.power_loss [--draws 20000] [--seed 0] [--step delete] [--keep FOLDER]

A process chats with a tiny model, and changes, exports, deletes, and restores sessions (`tools/disk/scenario.py`),
while every write, rename, and flush in its home folder is recorded. Then the disk is rebuilt as a power failure after
each of these calls may leave it (`tools/disk/states.py`), and opened: every promise that was made until then must hold
(`tools/disk/judge.py`). The recording itself is checked: the files that are rebuilt from all changes must equal those
of the process, byte for byte. Linux only; needs a C compiler.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tests.support.real_engine import tiny_loaded
from tools.disk import journal, shim
from tools.disk.journal import Recording
from tools.disk.judge import Fault, Judge, write_state
from tools.disk.promises import Story
from tools.disk.states import POLICIES, Disk, Left, power_failures

MAX_FAULTS = 20
"""The run ends after this many."""


@dataclass
class Outcome:
    """What came of a run."""

    changes: int = 0
    states: int = 0
    results: Counter[str] = field(default_factory=Counter)
    policies: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def record(folder: Path) -> Recording:
    """Have the chat in a process of its own, in `folder`; return what it wrote.

    Raises:
        RuntimeError: The chat failed, or not all of its writes were seen.
    """
    home, log = folder / "recorded", folder / "log"
    home.mkdir()
    command = [sys.executable, "-m", "tools.disk.scenario", str(home), str(log)]
    done = subprocess.run(command, env=shim.environment(shim.build(folder), home), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the chat to be recorded failed ({done.returncode}): {done.stderr[-2000:]}")
    recording = journal.read(log, home)
    if unseen := _unseen(recording, home):
        raise RuntimeError(f"the log misses changes of {', '.join(unseen[:5])}")
    return recording


def _unseen(recording: Recording, home: Path) -> list[str]:
    """Return the files that the log does not explain."""
    disk = Disk(recording)
    for change in recording.changes:
        disk.apply(change)
    rebuilt = disk.state(POLICIES[0], random.Random(0))
    real = {str(path.relative_to(home)): None if path.is_dir() else path.read_bytes() for path in home.rglob("*")}
    return sorted(path for path in {*rebuilt, *real} if rebuilt.get(path, b"?") != real.get(path, b"?"))


def run(
    folder: Path,
    draws: int,
    seed: int,
    *,
    step: str = "",
    keep: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Record, rebuild and judge.

    Args:
        folder: An empty folder, best in memory.
        draws: Number of power failures to draw.
        seed: Of the draws.
        step: Only moments of this step and until the next one; "" for all.
        keep: Folder for the disks that were judged faulty.
        say: Takes a line for each fault, and from time to time the progress.
    """
    torch.set_num_threads(1)
    recording = record(folder)
    story, judge = Story(recording), Judge(tiny_loaded())
    outcome = Outcome(changes=len(recording.changes))
    for left in power_failures(recording, draws, seed, lambda moment: not step or story.at(moment).latest == step):
        outcome.states += 1
        outcome.policies[left.policy.name] += 1
        home = folder / f"state-{outcome.states}"
        write_state(left.state, home)
        try:
            outcome.results[judge.judge(home, story.at(left.moment))] += 1
        except Exception as error:
            outcome.faults.append(_described(left, story, error))
            say(outcome.faults[-1])
            if keep is not None:
                write_state(left.state, keep / home.name)
            if len(outcome.faults) >= MAX_FAULTS:
                break
        write_state({}, home)
        home.rmdir()
        if outcome.states % 500 == 0:
            say(f"{outcome.states} states, after {left.moment} of {outcome.changes} changes")
    return outcome


def _described(left: Left, story: Story, error: Exception) -> str:
    step = story.at(left.moment).step
    where = f"during “{step}”" if step else "between two steps"
    what = str(error) if isinstance(error, Fault) else f"{type(error).__name__}: {error}"
    return f"after {left.moment} changes, {where}, {left.policy.name}: {what}"


def main() -> int:
    """Run the power failures and print the results; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draws", type=int, default=20_000, help="number of power failures (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", default="", help="only failures during and after this step, such as `delete`")
    parser.add_argument("--keep", type=Path, help="folder in which faulty disks are kept")
    args = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=shim.work_folder()) as folder:
        outcome = run(
            Path(folder),
            args.draws,
            args.seed,
            step=args.step,
            keep=args.keep,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
    print(
        f"{outcome.states} states of the disk after a power failure in a chat of {outcome.changes} changes, judged in "
        f"{time.perf_counter() - started:.0f} s ({time.process_time():.0f} s of CPU time): {len(outcome.faults)} faults"
    )
    for name, count in [*outcome.results.most_common(), *outcome.policies.most_common()]:
        print(f"{count:8} {name}")
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
