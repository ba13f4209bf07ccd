"""The tool that changes the program: what it changes, what it leaves alone, and that it tells mutants apart."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tools.mutation.mutants import ROOT, Mutant, mutants_of, mutated_tree
from tools.mutation.sample import Trace, draw, key_of, read_explained, wilson

LEDGER = "streamchat/cache/eviction/ledger.py"


def changes(source: str) -> list[tuple[str, str]]:
    return [(each.before, each.after) for each in mutants_of("streamchat/cache/x.py", source)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a < b", {("a < b", "a <= b"), ("a < b", "pass")}),
        ("x = a + 2", {("a + 2", "a - 2"), ("2", "3"), ("2", "1")}),
        ("x = a and not b", {("a and (not b)", "a or not b"), ("not b", "b")}),
        ("if a: pass", {("if a:", "if not a:")}),
        ("def f():\n    return a[1:]", {("return a[1:]", "return None"), ("1:", ":"), ("1", "2")}),
        ("def f():\n    return False", {("False", "True")}),
        ("self.x = max(a, b)", {("self.x = max(a, b)", "pass"), ("max(a, b)", "min(a, b)")}),
        ("x = [a for a in b if a]", {(" for a in b if a", " for a in b")}),
        ("x = f(a, b=c)", {("f(a, b=c)", "f(a)")}),
        ("for a in b:\n    if a is None: break", {("a is None", "a is not None"), ("break", "continue")}),
    ],
)
def test_changes(source: str, expected: set[tuple[str, str]]) -> None:
    assert set(changes(source)) == expected


@pytest.mark.parametrize(
    "source",
    [
        '"""Text."""',
        "x: dict[str, 'A | B'] = y",
        "def f(a: 'int | None') -> 'A': ...",
        "if TYPE_CHECKING:\n    x = 1",
        "def f():\n    _log.info('%s', 1 + 1)",
        "assert a < b",
        "x = ValueError(f'{a + 1} is too much')",
        "x = cast('A', y)",
        "x = zip(a, b, strict=True)",
        "@cache(1)\ndef f(): ...",
        "__all__ = ['a']",
        "A = Literal['a', 'b']",
        "x = f'{a} is too much'",
        "x = Thread(name='a', daemon=True)",
        "x = tokenizer(text, verbose=False)",
        "x = field(repr=False)",
        "x = perf_counter() - before",
    ],
)
def test_what_no_test_could_notice_is_not_changed(source: str) -> None:
    assert changes(source) == []


def test_a_mutant_is_the_module_with_one_change_on_the_same_lines() -> None:
    source = (ROOT / LEDGER).read_text("utf-8")
    mutants = mutants_of(LEDGER)
    assert len(mutants) > 50
    for each in mutants[::7]:
        tree = mutated_tree(LEDGER, each.number)
        assert ast.unparse(tree) != ast.unparse(ast.parse(source)), each
        assert source.splitlines()[each.line - 1].strip() == each.text
    with pytest.raises(IndexError, match="has no mutant"):
        mutated_tree(LEDGER, len(mutants))


def mutant_in(path: str, number: int, function: str = "f", line: int = 1) -> Mutant:
    return Mutant(path, number, line, line, function, "", "", "")


def test_each_package_has_its_share_of_a_sample() -> None:
    by_package = {
        name: [mutant_in(f"streamchat/{name}/x.py", i) for i in range(n)] for name, n in (("a", 60), ("b", 30))
    }
    sample = draw(by_package, 30, seed=1)
    assert Counter(each.package for each in sample) == {"a": 20, "b": 10}
    assert len(set(sample)) == 30
    assert draw(by_package, 30, seed=1) == sample != draw(by_package, 30, seed=2)
    assert len(draw(by_package, 1000, seed=1)) == 90


def test_the_interval_is_that_of_wilson() -> None:
    low, high = wilson(270, 300)
    assert low == pytest.approx(0.8609, abs=2e-4)
    assert high == pytest.approx(0.9290, abs=2e-4)
    assert wilson(0, 0) == (0, 1)
    assert wilson(10, 10)[1] == pytest.approx(1)


def test_tests_that_execute_the_line_are_chosen_fastest_first(tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text('{"seconds": {"a": 3, "b": 1}, "lines": {"x.py": {"1": ["a"], "2": ["a", "b"]}}}')
    new.write_text('{"seconds": {"a": 0.5, "c": 2}, "lines": {"x.py": {"2": ["a", "c"]}}}')
    trace = Trace.read([old, new])
    assert trace.tests_of(mutant_in("x.py", 0, line=1), 60) == []  # "a" does not execute it any more
    assert trace.tests_of(mutant_in("x.py", 0, line=2), 60) == ["a", "b", "c"]
    assert trace.tests_of(mutant_in("x.py", 0, line=2), 2) == ["a", "b"]
    assert trace.tests_of(mutant_in("x.py", 0, function="", line=9), 60) == ["a", "b", "c"]
    assert trace.tests_of(mutant_in("y.py", 0), 60) == []


def test_every_explanation_is_of_a_mutant() -> None:
    explained = read_explained()
    there = {key_of(each) for path in sorted({key[0] for key in explained}) for each in mutants_of(path)}
    assert explained.keys() <= there


def test_an_explanation_needs_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "explained.toml"
    path.write_text('[[mutant]]\npath = "a"\nfunction = "f"\ntext = "1"\nbefore = "1"\nafter = "2"\nreason = " "\n')
    with pytest.raises(ValueError, match="has no reason"):
        read_explained(path)


PROGRAM = """
import os, sys
from tools.mutation.mutants import mutants_of
from tools.mutation.runner import Runner
path, drops, past = sys.argv[1:]
def break_index_at():  # so that one test fails without a mutant
    sys.modules["streamchat.cache.eviction.ledger"].Ledger.index_at = None
os.register_at_fork(after_in_child=break_index_at)
mutants = {(each.function, each.before, each.after): each for each in mutants_of(path)}
split = mutants["_split", "slot > 0", "slot >= 0"]
size = mutants["Ledger.__len__", "stop - first", "stop + first"]
field = mutants["", "field(default_factory=list)", "field()"]
tests = {split: [past, drops], size: [past, drops], field: [drops]}
names = {split: "split", size: "size", field: "field"}
out = sys.stdout  # that of pytest is discarded
def report(mutant, outcome):
    print(names[mutant], outcome.status, outcome.test, file=out)
runner = Runner(tests.__getitem__, {drops: 1, past: 1}, report, workers=2)
runner.run(list(tests))
print("unreliable", *runner.unreliable)
"""


@pytest.mark.slow
def test_a_mutant_is_detected_by_a_test_that_fails_only_with_it(tmp_path: Path) -> None:
    tests = "tests/cache/test_ledger.py::"
    drops, past = tests + "test_dropping_nothing_splits_nothing", tests + "test_a_slot_past_the_end_is_an_error"
    command = [sys.executable, "-c", PROGRAM, LEDGER, drops, past]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    expected = [f"field failed {drops}", "size survived ", f"split failed {drops}", f"unreliable {past}"]
    assert sorted(found.stdout.splitlines()) == expected, found.stderr
    assert [*tmp_path.iterdir()] == []
