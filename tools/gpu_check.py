"""Checks and measures streamchat on one GPU: `python -m tools.gpu_check --out FOLDER`.

The parts run one after the other, the most valuable first, each in processes of its own with a time limit; what a part
prints goes to FOLDER/PART.txt while it runs, and FOLDER/done.json has the results. A part that fails, crashes or takes
too long does not end the others. All parts take less than 15 minutes. One call takes at most `--seconds`; a second one
with `--skip-done` continues with the parts that are missing:

    python -m tools.gpu_check --out found
    python -m tools.gpu_check --out found --skip-done

The default model must be here: without a network, run `streamchat verify` elsewhere, which fetches and converts it, and
set STREAMCHAT_HOME to a copy of that folder. `--stand-in` runs everything on a CPU with recorded operations and small
sizes, to test this program.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

STREAMCHAT = (sys.executable, "-m", "streamchat")
STAND_IN = (sys.executable, "-m", "tests.support.stand_in_program")
SHOWN = 25
"""Lines of a part that are repeated on the terminal."""


@dataclass(frozen=True)
class Part:
    """One check or measurement."""

    limit_s: float
    command: list[str]


@dataclass(frozen=True)
class Outcome:
    """How a part ended."""

    result: str
    """`ok`, `exit code N`, or `stopped after N s`."""
    seconds: float


def parts_of(model: str, device: str, turns: int, out: Path) -> dict[str, Part]:
    """Return the parts for a GPU by name, in their order."""
    chosen = ["--model", model, "--device", device]
    bench = [*STREAMCHAT, "bench", "--gpu", *chosen, "--json", "--no-charts"]
    long = ["--shapes", "model", "--kinds", "fused", "--tokens", "100000"]
    chat = [sys.executable, "-m", "tools.gpu_chat", *chosen, "--turns", str(turns)]
    return {
        "steps": Part(140, [sys.executable, "-m", "tools.gpu_steps", "--device", device]),
        "bench": Part(270, [*bench, "--out", str(out / "bench")]),
        "chat": Part(110, chat),
        "flat": Part(120, [*bench, *long, "--out", str(out / "flat")]),
        "tests": Part(130, [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"]),
        "verify": Part(60, [*STREAMCHAT, "verify", *chosen]),
        "ppl": Part(45, [*STREAMCHAT, "ppl", *chosen, "--methods", "dense,sinks", "--max-tokens", "4096", "--json"]),
        "doctor": Part(20, [*STREAMCHAT, "doctor", *chosen]),
    }


def stand_in_parts(model: str, out: Path) -> dict[str, Part]:
    """Return the same parts for a CPU that stands in for the GPU, with small sizes."""
    chosen = ["--model", model, "--device", "cpu"]
    sizes = ["--cache-size", "64", "--new-tokens", "4", "--rounds", "2"]
    bench = [*STAND_IN, "bench", "--gpu", "--model", model, *sizes, "--json", "--no-charts"]
    steps = ["--stand-in", "--kinds", "graph", "--dtypes", "float32", "--models", "llama", "gpt_neox"]
    text = ["--methods", "sinks", "--cache-size", "64", "--max-tokens", "200", "--chunk", "8", "--json"]
    long = ["--shapes", "135M", "--kinds", "graph", "--tokens", "100"]
    small = "test_a_gpu_writes_what_the_cpu_writes and stand-in and llama"
    return {
        "steps": Part(120, [sys.executable, "-m", "tools.gpu_steps", *steps]),
        "bench": Part(200, [*bench, "--shapes", "model,135M", "--out", str(out / "bench")]),
        "chat": Part(120, [sys.executable, "-m", "tools.gpu_chat", "--model", model, "--stand-in", "--turns", "8"]),
        "flat": Part(120, [*bench, *long, "--out", str(out / "flat")]),
        "tests": Part(120, [sys.executable, "-m", "pytest", "-q", "tests/gpu/test_gpu.py", "-k", small]),
        "verify": Part(120, [*STREAMCHAT, "verify", *chosen]),
        "ppl": Part(120, [*STREAMCHAT, "ppl", *chosen, *text]),
        "doctor": Part(60, [*STREAMCHAT, "doctor", *chosen]),
    }


def main() -> int:
    """Run the parts; return 1 if one failed, 2 if a name is not known."""
    parser = argparse.ArgumentParser(prog="tools.gpu_check", description="Check and measure streamchat on one GPU.")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder for what the parts print")
    parser.add_argument("--only", nargs="+", metavar="PART", help="run only these parts")
    parser.add_argument("--skip-done", action="store_true", help="skip parts that an earlier call has run to their end")
    parser.add_argument("--seconds", type=float, default=570, help="time for this call (default: 570)")
    parser.add_argument("--model", default="default", help="the model (default: the bundled one)")
    parser.add_argument("--device", default="cuda", help="where it runs (default: cuda)")
    parser.add_argument("--turns", type=int, default=200, help="turns of the chat (default: 200)")
    parser.add_argument("--stand-in", action="store_true", help="test this program on a CPU, with small sizes")
    args = parser.parse_args()
    out = args.out.absolute()
    parts = stand_in_parts(args.model, out) if args.stand_in else parts_of(args.model, args.device, args.turns, out)
    unknown = [name for name in args.only or () if name not in parts]
    if unknown:
        print(f"{unknown[0]!r} is not a part; choose from {', '.join(parts)}", file=sys.stderr)
        return 2
    done = read_outcomes(out) if args.skip_done else {}
    chosen = {
        name: part
        for name, part in parts.items()
        if (args.only is None or name in args.only) and (name not in done or done[name].result != "ok")
    }
    return run_parts(chosen, out, args.seconds)


def run_parts(chosen: Mapping[str, Part], out: Path, seconds: float) -> int:
    """Run the parts one after the other, also after a failure; return 1 if one failed or was not started."""
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    outcomes: dict[str, Outcome] = {}
    for name, part in chosen.items():
        left = deadline - time.monotonic()
        if left < part.limit_s:  # a later one may fit
            outcomes[name] = Outcome(f"needs {part.limit_s:.0f} s; run again with --skip-done", 0.0)
            continue
        print(f"==> {name}: {' '.join(part.command)}", flush=True)
        outcomes[name] = run_part(part, out / f"{name}.txt", part.limit_s)
        write_outcomes(out, read_outcomes(out) | {name: outcomes[name]})
        text = (out / f"{name}.txt").read_text(encoding="utf-8", errors="replace")
        print("\n".join(line[:400] for line in text.splitlines()[-SHOWN:]), flush=True)
    print("\n==> summary")
    for name, outcome in outcomes.items():
        print(f"{name:8} {outcome.result:42} {outcome.seconds:6.1f} s")
    return 0 if all(outcome.result == "ok" for outcome in outcomes.values()) else 1


def run_part(part: Part, file: Path, limit_s: float) -> Outcome:
    """Run one part, with its output in `file`; end all its processes when the time is over."""
    started = time.monotonic()
    with file.open("wb") as output:
        try:
            process = subprocess.Popen(
                part.command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return Outcome(f"not started: {error.strerror}", 0.0)
        try:
            code = process.wait(limit_s)
            result = "ok" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            result = f"stopped after {limit_s:.0f} s"
        finally:
            with suppress(ProcessLookupError):  # also what it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Outcome(result, time.monotonic() - started)


def read_outcomes(out: Path) -> dict[str, Outcome]:
    """Return how parts ended in earlier calls."""
    try:
        found = json.loads((out / "done.json").read_text(encoding="utf-8"))
        return {name: Outcome(**outcome) for name, outcome in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def write_outcomes(out: Path, outcomes: Mapping[str, Outcome]) -> None:
    """Write how parts ended."""
    text = json.dumps({name: asdict(outcome) for name, outcome in outcomes.items()}, indent=1)
    (out / "done.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
