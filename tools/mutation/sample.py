"""Which mutants are run, which tests, and what the result is worth."""

from __future__ import annotations

import json
import math
import random
import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.mutation.mutants import Mutant

EXPLAINED = Path(__file__).with_name("explained.toml")
KEY = ("path", "function", "text", "before", "after")
"""What names a mutant in that file."""


@dataclass(frozen=True)
class Trace:
    """The CPU time of each test in seconds, and the tests that execute each line of each file."""

    seconds: dict[str, float]
    lines: dict[str, dict[int, list[str]]]

    @classmethod
    def read(cls, paths: Sequence[Path]) -> Trace:
        """Merge files of `tools.mutation.trace`; the last one that has a test counts."""
        seconds, lines = dict[str, float](), defaultdict[str, dict[int, list[str]]](lambda: defaultdict(list))
        for path in reversed(paths):
            data = json.loads(path.read_text("utf-8"))
            new = data["seconds"].keys() - seconds.keys()
            seconds |= {test: data["seconds"][test] for test in new}
            for file, by_line in data["lines"].items():
                for line, tests in by_line.items():
                    lines[file][int(line)] += [test for test in tests if test in new]
        return cls(seconds, lines)

    def tests_of(self, mutant: Mutant, budget_s: float) -> list[str]:
        """Return the tests that execute the line, fastest first, as long as they fit into the budget.

        Code outside of functions runs at the import: the tests of all functions in its file follow.
        """
        by_line = self.lines.get(mutant.path, {})
        tests = set(by_line.get(mutant.line) or by_line.get(mutant.statement) or [])
        if not mutant.function:
            tests = {each for found in by_line.values() for each in found}
        chosen, spent = list[str](), 0.0
        for test in sorted(tests, key=lambda each: (self.seconds[each], each)):
            spent += self.seconds[test]
            if spent > budget_s and chosen:
                break
            chosen.append(test)
        return chosen


def read_explained(path: Path = EXPLAINED) -> dict[tuple[str, ...], str]:
    """Return the reasons why mutants need no test, by what `key_of` returns.

    Raises:
        ValueError: An entry has no reason.
    """
    found = {}
    for entry in tomllib.loads(path.read_text("utf-8")).get("mutant", []):
        if not entry["reason"].strip():
            raise ValueError(f"{entry} has no reason")
        found[tuple(entry[name] for name in KEY)] = entry["reason"]
    return found


def key_of(mutant: Mutant) -> tuple[str, ...]:
    """Return what an explanation names a mutant by; a line that moves keeps it."""
    return tuple(getattr(mutant, name) for name in KEY)


def draw(by_package: Mapping[str, Sequence[Mutant]], count: int, seed: int) -> list[Mutant]:
    """Return a random sample in which each package has its share of all mutants."""
    generator, everything = random.Random(seed), sum(map(len, by_package.values()))
    chosen = list[Mutant]()
    for package in sorted(by_package):
        mutants = by_package[package]
        chosen += generator.sample(mutants, min(round(count * len(mutants) / everything), len(mutants)))
    generator.shuffle(chosen)
    return chosen


def wilson(successes: int, of: int) -> tuple[float, float]:
    """Return the 95% Wilson score interval of a rate."""
    if not of:
        return 0.0, 1.0
    z, rate = 1.959964, successes / of
    middle = (rate + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(rate * (1 - rate) / of + z * z / (4 * of * of))
    return max(middle - half, 0.0), min(middle + half, 1.0)
