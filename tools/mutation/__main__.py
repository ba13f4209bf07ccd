"""Changes the program in a small way, many times, and checks that a test fails each time.

    python -m tools.mutation --packages cache conversation sessions --sample 300 --seed 1
    python -m tools.mutation --only 'streamchat/cache/room.py#3'

The first run traces which test executes which line (build/mutation/trace.json; --trace-again after a change of tests or
program). Each mutant then runs, in a forked process, the tests that execute its line, fastest first, until one fails.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools.mutation.children import Outcome
from tools.mutation.mutants import ROOT, Mutant, mutants_of
from tools.mutation.sample import KEY, Trace, draw, key_of, read_explained, wilson

PACKAGES = ("cache", "conversation", "sessions")
TESTS = (*(f"tests/{each}" for each in PACKAGES), "tests/engine", "tests/store", "tests/scripting", "tests/frontend")
UNDETECTED = ("survived", "error")
MARKS = "not slow and not model and not gpu"
FOLDER = ROOT / "build" / "mutation"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sample of mutants, or one; return 1 if less than `--at-least` of them are detected."""
    args = _parser().parse_args(argv)
    mutants = {each: _mutants_in(each) for each in args.packages}
    explained = read_explained()
    open_to = {name: [each for each in found if key_of(each) not in explained] for name, found in mutants.items()}
    outcomes = dict[Mutant, Outcome]()
    if args.again:
        found = outcomes_in(
            json.loads(args.again.read_text("utf-8")), [each for every in open_to.values() for each in every]
        )
        chosen, outcomes = (
            list(found),
            {each: outcome for each, outcome in found.items() if outcome.status not in UNDETECTED},
        )
    elif args.only:
        path, _, number = args.only.partition("#")
        chosen = [each for each in mutants_of(path) if not number or each.number == int(number)]
    else:
        chosen = draw(open_to, args.sample, args.seed)
    if args.list:
        print(*chosen, sep="\n")
        return 0
    trace = Trace.read(args.trace or [_traced(args)])
    started = time.monotonic()

    def report(mutant: Mutant, outcome: Outcome) -> None:
        outcomes[mutant] = outcome
        by = f" by {outcome.test}" if outcome.test else ""
        print(f"{len(outcomes)}/{len(chosen)} {outcome.status}{by}: {mutant}", file=sys.stderr, flush=True)

    from tools.mutation.runner import Runner

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that temporary folders are removed
    runner = Runner(lambda each: trace.tests_of(each, args.budget_s), trace.seconds, report, args.workers)
    runner.run([each for each in chosen if each not in outcomes])
    survived = [each for each in chosen if outcomes[each].status in UNDETECTED]
    excluded = sum(key_of(each) in explained for found in mutants.values() for each in found)
    summary = {
        "of": sum(map(len, mutants.values())),
        "explained": excluded,
        "sample": len(chosen),
        "seed": args.seed,
        "seconds": round(time.monotonic() - started),
        "unreliable tests": sorted(runner.unreliable),
        "mutants": [asdict(each) | asdict(outcomes[each]) for each in chosen],
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    args.report.write_text(json.dumps(summary, indent=1))
    _print(chosen, outcomes, [each for each in survived if trace.tests_of(each, 0)])
    print(f"{excluded} of {summary['of']} mutants are explained; {summary['seconds']} s; {args.report}")
    return 0 if len(survived) <= (1 - args.at_least) * len(chosen) else 1


def outcomes_in(report: dict[str, Any], mutants: Sequence[Mutant]) -> dict[Mutant, Outcome]:
    """Return the outcomes of an earlier report for those mutants that still exist; their numbers may have changed."""
    there = defaultdict[tuple[object, ...], list[Mutant]](list)
    for each in mutants:
        there[_place(asdict(each))].append(each)
    found = dict[Mutant, Outcome]()
    for entry in report["mutants"]:
        if same := there[_place(entry)]:
            nearest = min(same, key=lambda each: abs(each.number - entry["number"]))
            same.remove(nearest)
            found[nearest] = Outcome(entry["status"], entry["test"])
    return found


def _place(entry: dict[str, Any]) -> tuple[object, ...]:
    return entry["line"], *(entry[name] for name in KEY)


def _print(chosen: Sequence[Mutant], outcomes: dict[Mutant, Outcome], executed: Sequence[Mutant]) -> None:
    for each in chosen:
        if outcomes[each].status in UNDETECTED:
            print(f"{outcomes[each].status}{'' if each in executed else ' (no test executes it)'}: {each}")
            print(f"    {each.function or 'module'}: {each.text}")
    for package in (*sorted({each.package for each in chosen}), "all"):
        of = Counter(outcomes[each].status for each in chosen if package in (each.package, "all"))
        detected = of.total() - sum(of[each] for each in UNDETECTED)
        low, high = wilson(detected, of.total())
        how = f"{of['failed']} failed, {of['crashed']} crashed, {of['timeout']} timed out"
        print(f"{package}: {detected} of {of.total()} detected = {detected / max(of.total(), 1):.1%}", end=" ")
        print(f"(95% interval {low:.1%} to {high:.1%}; {how})")


def _mutants_in(package: str) -> list[Mutant]:
    files = sorted((ROOT / "streamchat" / package).rglob("*.py"))
    return [each for file in files for each in mutants_of(str(file.relative_to(ROOT)))]


def _traced(args: argparse.Namespace) -> Path:
    """Return the file of the trace; trace the tests if it is missing."""
    path = FOLDER / "trace.json"
    if args.trace_again or not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        trace_tests(path, args.packages, args.tests)
    return path


def trace_tests(path: Path, packages: Sequence[str], tests: Sequence[str]) -> None:
    """Run tests once with coverage, and write which lines each executes.

    Raises:
        SystemExit: pytest did not write the file.
    """
    sources = ":".join(f"streamchat/{each}" for each in packages)
    environment = {**os.environ, "MUTATION_TRACE": str(path.resolve()), "MUTATION_SOURCES": sources}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tools.mutation.trace",
        "-p",
        "no:cacheprovider",
        "-m",
        MARKS,
    ]
    path.unlink(missing_ok=True)
    subprocess.run([*command, *tests], cwd=ROOT, env=environment, stdout=sys.stderr)
    if not path.exists():
        raise SystemExit("pytest wrote no trace; its output is above")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.mutation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--packages", nargs="+", default=list(PACKAGES), help="packages of streamchat (default: all three)"
    )
    parser.add_argument("--sample", type=int, default=300, help="number of mutants (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the sample (default: %(default)s)")
    parser.add_argument("--only", metavar="PATH[#NUMBER]", help="all mutants of a file, or one")
    parser.add_argument(
        "--again", type=Path, metavar="REPORT", help="mutants of an earlier report; runs the undetected"
    )
    parser.add_argument("--list", action="store_true", help="print the chosen mutants and run nothing")
    parser.add_argument("--tests", nargs="+", default=list(TESTS), help="files and folders of tests to trace")
    parser.add_argument("--trace", type=Path, nargs="+", help="traces to use (default: build/mutation/trace.json)")
    parser.add_argument("--trace-again", action="store_true", help="trace the tests even if there is a trace")
    parser.add_argument(
        "--budget-s", type=float, default=60, help="CPU time of the tests of one mutant (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=1, help="mutants at a time (default: %(default)s)")
    parser.add_argument("--at-least", type=float, default=0.9, help="rate to reach (default: %(default)s)")
    parser.add_argument("--report", type=Path, default=FOLDER / "report.json", help="JSON file to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
