"""`python -m tools.replay_scaling`: the same conversations with `streamchat replay` on 1, 2, and 4 workers.

Uses a tiny model with random weights. Prints a JSON object per number of workers, with the turns per second of the
whole command and of its turns alone; exits with 1 if the ids of a conversation differ, or the reports but for times.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from streamchat.base import child_processes
from streamchat.base.errors import ExitCode
from tests.support.models_help import save, tiny_llama
from tests.support.replay_workers import ids_of

FLAGS = ("--dtype=float32", "--cache-size=128", "--max-new-tokens=12", "--seed=1", "--temperature=1", "--fresh")
DRIFT = "--max-drift=1e9"
TIMES = ("turn-time", "first-token-time", "decode-time")
"""Invariants that are not compared: other programs may use the cores."""


def write_chats(path: Path, count: int, turns: int) -> None:
    """Write a script of conversations."""
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            texts = [f"question {number} {turn} about the sea and the ships on it" for turn in range(turns)]
            file.write(json.dumps({"messages": [{"role": "user", "content": text} for text in texts]}) + "\n")


def replay(root: Path, address: str | None, workers: int) -> dict[str, Any]:
    """Run the command with Ray's workers, or with processes if there is no address; return its figures."""
    out = root / f"run-{workers}"
    command = child_processes.python(
        "-m", "streamchat", "replay", str(root / "chats.jsonl"), f"--model={root / 'model'}"
    )
    command += [
        *FLAGS,
        DRIFT,
        f"--out={out}",
        f"--workers={workers}",
        *([] if address is None else [f"--ray={address}"]),
    ]
    started = time.perf_counter()
    ended = subprocess.run(command, env=child_processes.environment(), check=False, stdout=sys.stderr)
    if ended.returncode not in (ExitCode.OK, ExitCode.CHECK_FAILED):
        raise SystemExit(ended.returncode)
    elapsed = time.perf_counter() - started
    rows = [json.loads(line) for line in (out / "turns.jsonl").read_text(encoding="utf-8").splitlines()]
    times = sorted(row["at"] for row in rows)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return {
        "workers": workers,
        "turns": len(rows),
        "turns_per_s": round(len(rows) / elapsed, 2),
        "turns_per_s_without_start": round((len(rows) - 1) / (times[-1] - times[0]), 2),
        "verdict": report["verdict"],
        "totals": report["totals"],
        "holds": {check["name"]: check["holds"] for check in report["invariants"] if check["name"] not in TIMES},
    }


def main() -> int:
    """Run the command with each number of workers; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.replay_scaling", description=__doc__)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--ray", default="local", metavar="ADDRESS", help="cluster (default: a new one for each run)")
    where.add_argument("--processes", action="store_true", help="processes of this machine instead of Ray's workers")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--conversations", type=int, default=500)
    parser.add_argument("--turns", type=int, default=4, help="turns per conversation (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        save(tiny_llama(max_position_embeddings=4096), root / "model")
        write_chats(root / "chats.jsonl", args.conversations, args.turns)
        found = [replay(root, None if args.processes else args.ray, workers) for workers in args.workers]
        for each in found:
            print(json.dumps(each))
        ids = [ids_of(root / f"run-{workers}") for workers in args.workers]
    same = all(each == ids[0] for each in ids)
    reports = {json.dumps([each["totals"], each["holds"]], sort_keys=True) for each in found}
    print(json.dumps({"same_ids": same, "same_reports": len(reports) == 1}))
    return 0 if same and len(reports) == 1 else 1


if __name__ == "__main__":
    raise SystemExit(main())
