"""Runs batches of programs with builds of the kernels, and compares the results."""

from __future__ import annotations

import signal
import struct
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tools.kernel_programs.builds import environment
from tools.kernel_programs.generate import random_program
from tools.kernel_programs.program import Program

STATUS = ("", "there was no memory", "input region {} was changed", "a red zone of region {} was written to")
STATUS_SCRATCH = "a red zone of scratch memory was written to, by the program before"
TIMEOUT_S = 1800
TOO_SLOW = f"driver: signal {signal.SIGALRM.value} "
"""What the driver prints about a program that is not done in 20 s, which other programs on the machine may cause."""


@dataclass(frozen=True)
class Fault:
    """A fault of a build."""

    build: str
    number: int
    what: str


@dataclass
class Batch:
    """Consecutive programs of a seed, written to a file."""

    seed: int
    numbers: Sequence[int]
    programs: list[Program]
    path: Path

    @classmethod
    def write(cls, seed: int, numbers: Sequence[int], folder: Path) -> Batch:
        """Generate the programs."""
        programs, path = [random_program(seed, number) for number in numbers], folder / "programs"
        with path.open("wb") as file:
            for program in programs:
                file.write(program.memory.encode())
                for region in program.memory.regions:
                    region.content = b""  # not needed any more
        return cls(seed, numbers, programs, path)

    def run(self, build: str, command: Sequence[str], folder: Path) -> Iterator[Fault]:
        """Run all programs with a compiled driver, and yield the faults. Continues after a program that crashes.

        A program that is too slow gets a second try.
        """
        results, first, repeated = folder / f"results-{build}", 0, -1
        while first < len(self.programs):
            results.write_bytes(b"")
            done = subprocess.run(
                [*command, str(self.path), str(results), str(first)],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT_S,
                check=False,
                env=environment(),
            )
            data, at = results.read_bytes(), 0
            while at < len(data):
                index, status, detail = struct.unpack_from("<3q", data, at)
                program = self.programs[index]
                end = at + 24 + program.memory.returned_size()
                for what in _faults(program, status, detail, data[at + 24 : end]):
                    yield Fault(build, self.numbers[index], what)
                at, first = end, index + 1
            if done.returncode and TOO_SLOW in done.stderr and repeated != first:
                repeated = first
            elif done.returncode:
                index = min(first, len(self.programs) - 1)
                yield Fault(build, self.numbers[index], f"status {done.returncode}: {_shortened(done.stderr)}")
                first += 1
            elif first < len(self.programs):
                raise RuntimeError(f"{build} returned {first} of {len(self.programs)} results")
        results.unlink(missing_ok=True)


def _faults(program: Program, status: int, detail: int, data: bytes) -> Iterator[str]:
    if status:
        yield STATUS_SCRATCH if status == len(STATUS) else STATUS[status].format(detail)
    with np.errstate(all="ignore"):
        yield from program.faults(program.memory.decode(data))


def _shortened(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and not set(line) <= {"="}]
    return " | ".join(line.strip()[:200] for line in lines[:14]) or "no message"
