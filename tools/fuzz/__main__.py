"""Fuzz everything that parses input: files, settings, templates, keys, and requests.

    python -m tools.fuzz TARGET [TARGET ...] [--seconds 60] [--seed 0]
    python -m tools.fuzz --all --seconds 1800

Inputs are made from the corpus in tests/corpus/TARGET, guided by coverage (atheris: pip install 'streamchat[fuzz]').
Each input must be accepted, or refused with a documented error of one sentence, within bounded time and memory. An
input with a fault is minimized, written into the corpus, and reported; the tests then repeat it. With --plain, inputs
are random changes of the corpus, and atheris is not needed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools.fuzz.check import MAX_SECONDS, find_fault
from tools.fuzz.minimize import minimized
from tools.fuzz.mutate import mutations
from tools.fuzz.target import Target, load_target, target_names
from tools.fuzz.workplace import workplace

ROOT = Path(__file__).parents[2]
MEMORY_MB = 3_000
"""Memory of the process that fuzzes, with the libraries that it loads."""


@dataclass
class Report:
    """The result of one run."""

    target: Target
    runs: int = 0
    edges: int = 0
    """Number of branches reached in the instrumented modules; 0 if they were not counted."""
    faults: dict[bytes, str] = field(default_factory=dict)
    """Minimized input -> what is wrong."""
    failure: str = ""
    """Why the run ended early."""


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzz the targets; return 1 if there is a fault, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(target_names()))
    parser.add_argument("--all", action="store_true", help="all targets, one after the other")
    parser.add_argument("--seconds", type=int, default=60, help="time for each target (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the mutations (default: %(default)s)")
    parser.add_argument("--plain", action="store_true", help="random changes of the corpus, without coverage")
    parser.add_argument("--work", type=Path, help="folder that keeps the inputs found by coverage between runs")
    parser.add_argument("--write-corpus", action="store_true", help="write the first inputs of the targets, and end")
    args = parser.parse_args(argv)
    names = target_names() if args.all else args.targets
    if not names or (wrong := [name for name in names if name not in target_names()]):
        parser.error(f"{wrong[0]!r} is not a target" if names else "give a target, or --all")
    if not (args.plain or args.write_corpus or importlib.util.find_spec("atheris")):
        parser.error("atheris is not installed; run: pip install 'streamchat[fuzz]', or give --plain")
    faults = 0
    for name in names:
        target = load_target(name)
        if args.write_corpus:
            _write_corpus(target)
            continue
        if args.plain:
            report = run_plain(target, args.seconds, args.seed)
        else:
            report = run_guided(target, args.seconds, args.seed, args.work)
        _show(report, args.seconds)
        faults += len(report.faults) + bool(report.failure)
    return int(faults > 0)


def _write_corpus(target: Target) -> None:
    target.folder.mkdir(parents=True, exist_ok=True)
    with workplace():
        for name, data in target.seeds().items():
            (target.folder / name).write_bytes(data)
    print(f"{target.name}: {len(list(target.folder.iterdir()))} inputs")


def run_plain(target: Target, seconds: float, seed: int) -> Report:
    """Run a target on random changes of its corpus."""
    report, end, known = Report(target), time.monotonic() + seconds, set()
    given = mutations(target.corpus(), target.words, seed=seed, count=sys.maxsize, max_bytes=target.max_bytes)
    with workplace():
        while time.monotonic() < end:
            data = next(given)
            report.runs += 1
            fault = find_fault(target, data)
            if fault is not None and fault.identity not in known:
                known.add(fault.identity)
                report.faults[minimized(target, data, fault)] = str(fault)
    return report


def run_guided(target: Target, seconds: int, seed: int, work: Path | None) -> Report:
    """Run a target under atheris, in another process."""
    report = Report(target)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary, "out")
        found = (work or Path(temporary)) / target.name
        out.mkdir()
        found.mkdir(parents=True, exist_ok=True)
        words = Path(temporary, "words")
        words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words), encoding="ascii")
        options = [
            f"-max_total_time={seconds}",
            f"-seed={seed + 1}",  # 0 means a random one there
            f"-max_len={target.max_bytes}",
            f"-timeout={int(4 * MAX_SECONDS)}",
            f"-rss_limit_mb={MEMORY_MB}",
            f"-artifact_prefix={out}/stop-",
            "-print_final_stats=1",
            *([f"-dict={words}"] if target.words else []),
        ]
        command = [sys.executable, "-m", "tools.fuzz.guided", target.name, str(out), ",".join(target.modules), *options]
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, str(found), str(target.folder)], cwd=ROOT, env=environ, capture_output=True, text=True,
            errors="replace", check=False,
        )  # fmt: skip
        report.runs = int((re.findall(r"stat::number_of_executed_units: (\d+)", done.stderr) or ["0"])[-1])
        report.edges = int((re.findall(r"cov: (\d+)", done.stderr) or ["0"])[-1])
        for path in sorted(out.glob("fault-*.txt")):
            report.faults[path.with_suffix("").read_bytes()] = path.read_text(encoding="utf-8").strip()
        for path in sorted(out.glob("stop-*")):  # out of time or memory: libFuzzer ends the process
            report.faults[path.read_bytes()] = path.name.removeprefix("stop-").split("-")[0]
        if done.returncode and not report.faults:
            report.failure = "\n".join(done.stderr.splitlines()[-15:])
    return report


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def _show(report: Report, seconds: int) -> None:
    target = report.target
    reached = f", {report.edges:,} edges" if report.edges else ""
    print(f"{target.name}: {report.runs:,} inputs in {seconds} s{reached}, {len(report.faults)} faults", flush=True)
    for data, text in report.faults.items():
        path = target.folder / f"fault-{hashlib.sha256(data).hexdigest()[:8]}"
        path.write_bytes(data)
        print(f"  {path.relative_to(ROOT)}: {text}")
    if report.failure:
        print(report.failure, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
