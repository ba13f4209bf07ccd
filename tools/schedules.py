"""Processes that open, search, write, delete, are killed and close in random order on one database: nothing is lost.

    python -m tools.schedules --schedules 1000 [--seed 0] [--steps 24] [--folder FOLDER]

A schedule has two or three real processes (`tools.actor`). They are told what to do one after the other or at the same
time, and some are killed with SIGKILL inside a write. At the end a new process looks at the file: every acknowledged
write must be there and found by the search, nothing else may be, and SQLite must find no fault. POSIX only: processes
are forked, so that a thousand schedules take minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.actor import serve

ANSWER_S = 60.0
COMMANDS = {"write": 10, "search": 5, "close": 4, "open": 2, "list": 2, "check": 1, "delete": 2, "kill": 3}
"""What a process is told, and how often."""


class Loss(AssertionError):
    """A schedule that lost or invented something, or damaged the file."""


class Child:
    """A forked process that carries out commands on a database."""

    def __init__(self, path: Path) -> None:
        here, self._commands = os.pipe()
        self._answers, there = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._work(path, here, there)
        os.close(here)
        os.close(there)
        self._unread = b""

    def _work(self, path: Path, here: int, there: int) -> None:
        code = 1
        try:
            for handle in range(3, 64):  # a pipe to a sibling that stayed open here would never end there
                if handle not in (here, there):
                    with suppress(OSError):
                        os.close(handle)
            with os.fdopen(here, encoding="utf-8") as lines:
                serve(path, lines, lambda answer: _write_all(there, json.dumps(answer)))
            code = 0
        except BaseException:
            import traceback

            _write_all(there, json.dumps({"failed": traceback.format_exc()}))
        finally:
            os._exit(code)

    def tell(self, *command: str) -> None:
        """Send a command; the answers are read later."""
        _write_all(self._commands, json.dumps(command))

    def answers(self) -> list[dict[str, Any]]:
        """All answers up to the end of a command, or of the process."""
        found: list[dict[str, Any]] = []
        while not found or "saved" in found[-1]:
            line = self._line()
            if line is None:
                break
            found.append(json.loads(line))
        return found

    def _line(self) -> bytes | None:
        while b"\n" not in self._unread:
            if not select.select([self._answers], [], [], ANSWER_S)[0]:
                raise Loss(f"no answer within {ANSWER_S:g} s")
            part = os.read(self._answers, 65536)
            if not part:
                return None
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def kill(self) -> None:
        """With SIGKILL, wherever it is."""
        os.kill(self.pid, signal.SIGKILL)

    def end(self) -> None:
        """Wait until it has ended; it does so when there are no more commands."""
        os.close(self._commands)
        os.waitpid(self.pid, 0)
        os.close(self._answers)


def _write_all(handle: int, line: str) -> None:
    data = line.encode() + b"\n"
    while data:
        data = data[os.write(handle, data) :]


@dataclass
class Oracle:
    """What must be in the database, and what may be."""

    saved: set[str] = field(default_factory=set)
    maybe: set[str] = field(default_factory=set)
    """Written by a process that was killed before it acknowledged them, or deleted likewise."""

    def heard(self, command: tuple[str, ...], answers: list[dict[str, Any]], *, killed: bool) -> None:
        """Take in what a process answered to `command`."""
        for answer in answers:
            if "failed" in answer or "error" in answer:
                raise Loss(f"{command}: " + "\n".join(map(str, answer.values())))
        acknowledged = {answer["saved"] for answer in answers if "saved" in answer}
        self.saved |= acknowledged
        finished = bool(answers) and "done" in answers[-1]
        if not finished and not killed:
            raise Loss(f"{command} was not carried out: {answers}")
        if command[0] == "write" and not finished:
            self.maybe |= set(command[1:]) - acknowledged
        if command[0] == "delete":
            self.saved.discard(command[1])
            if not finished:
                self.maybe.add(command[1])
        if command[0] == "check" and finished and answers[-1]["done"]:
            raise Loss(f"the database is damaged: {answers[-1]['done']}")

    def compare(self, titles: list[str], found: list[str], problem: str) -> None:
        """Raise `Loss` unless this is what must be there."""
        if problem:
            raise Loss(f"the database is damaged: {problem}")
        missing, extra = self.saved - set(titles), set(titles) - self.saved - self.maybe
        if missing or extra or len(titles) != len(set(titles)):
            raise Loss(f"{len(missing)} of {len(self.saved)} saved conversations are lost, {len(extra)} are extra")
        unfound = self.saved - set(found)
        if unfound:
            raise Loss(f"the search does not find {len(unfound)} of {len(self.saved)} saved conversations")


class Schedule:
    """One random order of commands for two or three processes.

    Args:
        path: The database; not there yet.
        rng: Decides everything.
        steps: Commands in all.
    """

    def __init__(self, path: Path, rng: random.Random, steps: int) -> None:
        self._path, self._rng, self._steps = path, rng, steps
        self.oracle = Oracle()
        self.told: Counter[str] = Counter()
        self._written = 0

    def run(self) -> None:
        """Carry it out and check the database.

        Raises:
            Loss: It is not as it must be.
        """
        children = [Child(self._path) for _ in range(self._rng.choice((2, 2, 3)))]
        try:
            left = self._steps
            while left > 0:
                # at the same time, or one alone
                chosen = self._rng.sample(children, self._rng.choice((1, 1, 2, len(children))))
                left -= len(chosen)
                self._step(children, chosen)
        finally:
            for child in children:
                child.end()
        self._check()

    def _step(self, children: list[Child], chosen: list[Child]) -> None:
        commands = [(child, self._command()) for child in chosen]
        killed = set()
        for child, command in commands:
            child.tell(*(command if command[0] != "kill" else ("write", *command[1:])))
        for child, command in commands:
            if command[0] == "kill":
                time.sleep(self._rng.choice((0.0, 0.0, 0.002, 0.01)))
                child.kill()
                killed.add(child)
        for child, command in commands:
            told = command if command[0] != "kill" else ("write", *command[1:])
            self.oracle.heard(told, child.answers(), killed=child in killed)
        for child in killed:
            child.end()
            children[children.index(child)] = Child(self._path)

    def _command(self) -> tuple[str, ...]:
        [name] = self._rng.choices(list(COMMANDS), list(COMMANDS.values()))
        self.told[name] += 1
        if name in ("write", "kill"):
            count = self._rng.choice((1, 1, 2, 6))
            self._written += count
            return (name, *(f"w{number}" for number in range(self._written - count, self._written)))
        if name in ("search", "delete"):
            known = sorted(self.oracle.saved)
            word = self._rng.choice(known) if known else "nothing"
            return (name, word)
        return (name,)

    def _check(self) -> None:
        looker = Child(self._path)
        try:
            results = []
            for command in (("list",), ("search", "say"), ("check",)):
                looker.tell(*command)
                answers = looker.answers()
                if not answers or "done" not in answers[-1]:
                    raise Loss(f"{command}: {answers}")
                results.append(answers[-1]["done"])
        finally:
            looker.end()
        self.oracle.compare(*results)


def run(schedules: int, seed: int, steps: int, folder: Path, first: int = 0) -> Counter[str]:
    """Carry out schedules `first` to `first + schedules`; returns how often each command was given.

    Raises:
        Loss: One of them lost something; its number is in the text.
    """
    told: Counter[str] = Counter()
    for number in range(first, first + schedules):
        place = folder / str(number)
        schedule = Schedule(place / "streamchat.db", random.Random(f"{seed}/{number}"), steps)
        try:
            schedule.run()
        except Loss as loss:
            raise Loss(f"schedule {number} of seed {seed} (in {place}): {loss}") from None
        shutil.rmtree(place)
        told += schedule.told
        told["saved"] += len(schedule.oracle.saved)
    return told


def main() -> int:
    """Run it and print what was done; the exit code is 1 for a loss."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--schedules", type=int, default=100, metavar="N", help="Number of schedules (default: 100).")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="Seed of all of them (default: 0).")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="Number of the first schedule (default: 0).")
    parser.add_argument("--steps", type=int, default=24, metavar="N", help="Commands per schedule (default: 24).")
    parser.add_argument("--folder", type=Path, metavar="FOLDER", help="Where the databases are made.")
    args = parser.parse_args()
    started = time.perf_counter()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        told = run(args.schedules, args.seed, args.steps, folder, args.first)
    except Loss as loss:
        print(loss, file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    done = ", ".join(f"{told[name]:,} {name}" for name in COMMANDS)
    seconds = time.perf_counter() - started
    print(f"{args.schedules:,} schedules in {seconds:.0f} s: {done}")
    print(f"{told['saved']:,} conversations saved, none lost, none extra, all found, no fault in any file")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
