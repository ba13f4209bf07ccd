"""The command line of `python -m tools.kernel_programs`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tools.kernel_programs as package
from tools.kernel_programs.builds import BUILDS, GROUPS, Build, chosen
from tools.kernel_programs.runner import Batch, Fault

BATCH = 400
MOST_SHOWN = 10
"""Of a build."""
MUTANT_BUILDS = "quick,gcc-x86-64-undefined,gcc-x86-64-thread"
"""Tried one after the other for each mutant."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run random programs; return 1 if a build has a fault, else 0."""
    args = _parser().parse_args(argv)
    try:
        builds = chosen((args.builds or (MUTANT_BUILDS if args.mutants else "all")).split(","))
    except KeyError as error:
        names = ", ".join([*GROUPS, *BUILDS])
        print(f"kernel_programs: there is no build {error}; choose from {names}", file=sys.stderr)
        return 2
    if args.mutants:
        from tools.kernel_programs.mutants import run_mutants

        return run_mutants(builds, args.seed, args.programs)
    numbers = [args.only] if args.only is not None else range(args.first, args.first + args.programs)
    with tempfile.TemporaryDirectory(prefix="kernel-programs-") as folder:
        commands = compiled(builds, Path(folder))
        print(f"seed {args.seed}: programs {numbers[0]} to {numbers[-1]}, {len(commands)} builds", flush=True)
        return _report(args.seed, numbers, commands, Path(folder))


def compiled(builds: Sequence[Build], folder: Path) -> dict[str, list[str]]:
    """Return the commands of the builds that this machine can run; print why others are skipped."""
    found = {}
    for build in builds:
        if why := build.missing():
            print(f"left out {build.name}: {why}", flush=True)
        else:
            found[build.name] = build.compile(folder)
    if not found:
        raise SystemExit("kernel_programs: this machine can run none of these builds")
    return found


def run_programs(
    seed: int, numbers: Sequence[int], commands: dict[str, list[str]], folder: Path, jobs: int = 2
) -> Iterator[tuple[int, list[Fault]]]:
    """Yield the size and the faults of each batch."""
    with ThreadPoolExecutor(jobs) as pool:
        for start in range(0, len(numbers), BATCH):
            batch = Batch.write(seed, numbers[start : start + BATCH], folder)
            ran = [pool.submit(_run, batch, *each, folder) for each in commands.items()]
            yield len(batch.programs), [fault for each in ran for fault in each.result()]


def _run(batch: Batch, build: str, command: Sequence[str], folder: Path) -> list[Fault]:
    return list(batch.run(build, command, folder))


def _report(seed: int, numbers: Sequence[int], commands: dict[str, list[str]], folder: Path) -> int:
    started, done, faults = time.monotonic(), 0, Counter[str]()
    for count, found in run_programs(seed, numbers, commands, folder):
        done += count
        for fault in found:
            faults[fault.build] += 1
            if faults[fault.build] <= MOST_SHOWN:
                print(f"{fault.build}, program {fault.number} (--seed {seed} --only {fault.number}): {fault.what}")
        if sys.stderr.isatty() or done % 20_000 < count or done == len(numbers):
            print(f"{done:,} programs, {sum(faults.values())} faults, {time.monotonic() - started:,.0f} s", flush=True)
    runs = len(numbers) * len(commands)
    print(f"{len(numbers):,} programs with {len(commands)} builds, {runs:,} runs: {sum(faults.values())} faults")
    for build, count in faults.most_common():
        print(f"  {build}: {count}")
    return 1 if faults else 0


def _number(text: str) -> int:
    """Return a number from 0 on."""
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def _count(text: str) -> int:
    """Return a number from 1 on."""
    if not (count := _number(text)):
        raise ValueError
    return count


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.kernel_programs",
        description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--programs", type=_count, default=1000, help="number of programs (default: %(default)s)")
    parser.add_argument("--seed", type=_number, default=1, help="seed of the programs (default: %(default)s)")
    parser.add_argument("--first", type=_number, default=0, help="number of the first program (default: %(default)s)")
    parser.add_argument("--only", type=_number, help="run only this program")
    parser.add_argument(
        "--builds", help=f"separated by commas: all, {', '.join(list(GROUPS)[1:])}, quick, or names (default: all)"
    )
    parser.add_argument("--mutants", action="store_true", help="break the kernels on purpose; report what is detected")
    return parser


if __name__ == "__main__":
    sys.exit(main())
