"""Random programs for the compiled kernels: a short, seeded run, and that it notices faults."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from streamchat.kernels.check_matrices import MATRICES
from streamchat.kernels.operations import BFLOAT16, FLOAT16, FLOAT32, INT4, INT8, K8V4
from tools.kernel_programs.__main__ import main
from tools.kernel_programs.bounded import EPS, Bounded, difference, normalize
from tools.kernel_programs.builds import BUILDS, GROUPS, chosen
from tools.kernel_programs.caches import CACHES, SINGLE, one_cache
from tools.kernel_programs.coded import SEARCHED
from tools.kernel_programs.experts import Mixture, with_shared
from tools.kernel_programs.generate import random_program
from tools.kernel_programs.mutants import MUTANTS, mutate, notice
from tools.kernel_programs.runner import Batch, Fault

QUICK, TRAP = BUILDS["quick"], BUILDS["clang-x86-64-trap-undefined"]
PROGRAMS = 250
pytestmark = pytest.mark.skipif(bool(QUICK.missing()), reason=QUICK.missing())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keeps what was compiled."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def driver(folder: Path) -> list[str]:
    return QUICK.compile(folder)


def run(driver: list[str], numbers: range, folder: Path, seed: int = 20) -> list[Fault]:
    return list(Batch.write(seed, numbers, folder).run("quick", driver, folder))


def test_random_programs_compute_what_python_computes(driver: list[str], tmp_path: Path) -> None:
    assert run(driver, range(PROGRAMS), tmp_path) == []


def test_a_program_is_the_same_for_the_same_seed_and_number() -> None:
    encoded = [random_program(*each).memory.encode() for each in ((3, 5), (3, 5), (3, 6), (4, 5))]
    assert encoded[0] == encoded[1]
    assert len(set(encoded)) == 3


def test_programs_have_every_format() -> None:
    """A format that the kernels get joins through the tables."""
    told = [what for number in range(200) for what, _ in random_program(1, number).checks]
    for bits, kind in MATRICES:
        assert any(f"of {bits} bits, format {kind}" in what for what in told)
    assert set(CACHES) == {BFLOAT16, FLOAT16, FLOAT32, INT8, INT4, K8V4}
    for sizes, kinds in (("Heads", CACHES), ("Range", SINGLE)):
        drawn = {int(found[1]) for what in told if (found := re.search(rf"of {sizes}\(.*kind=(\d)", what))}
        assert drawn == set(kinds)


@pytest.mark.parametrize(("kind", "dim"), [(INT4, 64), (INT4, 20), (INT8, 7)])
def test_only_the_numbers_of_the_best_scale_may_be_stored(kind: int, dim: int) -> None:
    x = np.random.default_rng(1).standard_normal((2, 3, dim))
    stored = one_cache(kind, searches=True).choices(Bounded.of(x))
    assert len(stored.is_allowed) == len(SEARCHED)
    assert (stored.is_allowed.sum(0) == 1).all()
    errors = ((stored.each.value - x) ** 2).sum(-1)
    assert (stored.is_allowed.argmax(0) == errors.argmin(0)).all()
    assert stored.difference(stored.bounds().value) == ""
    found = stored.bounds().value.copy()
    found[1, 2] = stored.each.value[errors[:, 1, 2].argsort()[1], 1, 2]
    assert "head 1, slot 2 is none of 1 choices" in stored.difference(found)


def test_scales_that_rounding_may_make_the_best_are_all_accepted() -> None:
    """With numbers that are not known exactly, the squared errors of several scales are close enough."""
    x = np.random.default_rng(1).standard_normal((1, 9, 64))
    exact, vague = (one_cache(INT4, True).choices(Bounded(x, np.full(x.shape, error))) for error in (0.0, 2e-4))
    assert (exact.is_allowed.sum(0) == 1).all()
    several = vague.is_allowed.sum(0) > 1
    assert several.any()
    for choice in range(len(vague.is_allowed)):
        found = np.where(vague.is_allowed[choice][..., None], vague.each.value[choice], vague.bounds().value)
        assert vague.difference(found) == ""


@pytest.mark.slow
@pytest.mark.skipif(bool(TRAP.missing()), reason=TRAP.missing())
def test_nothing_undefined_is_done(folder: Path, tmp_path: Path) -> None:
    """Formats without scales have no memory for them; NaN in a query, and in values of 4 bits, is not an integer."""
    command = TRAP.compile(folder)
    for seed, numbers in ((20, range(60)), (70, range(4116, 4117)), (70, range(4149, 4150))):
        assert list(Batch.write(seed, numbers, tmp_path).run(TRAP.name, command, tmp_path)) == []


def test_a_driver_that_crashes_is_told_with_its_program_and_the_others_go_on(folder: Path, tmp_path: Path) -> None:
    """The first mutant reads past the end of a matrix of float32."""
    command = QUICK.compile(folder, mutate(MUTANTS[0], tmp_path))
    faults = run(command, range(60), tmp_path)
    numbers = [fault.number for fault in faults]
    assert len(set(numbers)) > 3
    assert numbers == sorted(numbers)
    crashes = [fault.what for fault in faults if "status" in fault.what]
    assert len(crashes) > 1
    assert all("driver: access at byte" in what for what in crashes)


SLOW = """
import os, pathlib, struct, sys
programs, results, first = sys.argv[1:]
tries = pathlib.Path(sys.argv[0] + ".tries")
tries.write_text(tries.read_text() + first if tries.exists() else first)
with open(results, "ab") as file:
    for number in range(int(first), 3):
        if number == 1 and len(tries.read_text()) <= SLOW_TRIES:
            sys.exit("driver: signal 14 at (nil) in program 1")
        file.write(struct.pack("<3q", number, 0, 0))
"""
"""A driver whose second program is too slow a few times."""


@pytest.mark.parametrize(("slow_tries", "tries"), [(0, "0"), (1, "01"), (2, "012"), (9, "012")])
def test_a_program_that_is_too_slow_gets_a_second_try(
    slow_tries: int, tries: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.kernel_programs.runner._faults", lambda *_: ())
    monkeypatch.setattr("tools.kernel_programs.memory.Memory.returned_size", lambda _: 0)
    slow = tmp_path / "slow.py"
    slow.write_text(SLOW.replace("SLOW_TRIES", str(slow_tries)))
    batch = Batch.write(3, range(10, 13), tmp_path)
    found = list(batch.run("slow", [sys.executable, "-I", "-S", str(slow)], tmp_path))
    assert (tmp_path / "slow.py.tries").read_text() == tries
    assert found == [Fault("slow", 11, "status 1: driver: signal 14 at (nil) in program 1")] * (slow_tries > 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [1, 9, 15, 24])
def test_faults_in_the_kernels_are_noticed(number: int, folder: Path) -> None:
    assert notice(MUTANTS[number], [QUICK], 3, PROGRAMS, folder) is not None


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda each: each.name)
def test_mutants_fit_the_sources(mutant: object, tmp_path: Path) -> None:
    assert mutate(mutant, tmp_path).is_dir()  # type: ignore[arg-type]


def test_results_are_compared_with_bounds() -> None:
    expected = Bounded(np.array([1.0, 2.0, np.nan, np.inf, 5.0]), np.array([0.1, 0.0, 0.0, 0.0, np.inf]))
    assert difference(np.array([1.05, 2.0, np.inf, np.nan, np.nan]), expected) == ""
    for at, wrong in itertools.product((0, 1, 2, 3), (1.2, 7.0)):
        found = np.array([1.0, 2.0, np.nan, np.inf, 0.0])
        found[at] = wrong
        assert f"at [{at}]" in difference(found, expected)


@pytest.mark.parametrize(
    ("x", "weight", "is_any"),
    [([1e17, 1.0, 1e17], [1e22, 1e22, 1.0], [True, False, False]), ([1e-22, 0.0], [1e-22, 1.0], [False, False])],
    ids=["overflow", "subnormal"],
)
def test_the_factors_of_a_norm_may_be_multiplied_in_any_order(
    x: list[float], weight: list[float], is_any: list[bool]
) -> None:
    rows, weights = np.array([x], np.float32), np.array(weight, np.float32)
    expected = normalize(Bounded.of(rows), weights, None, 1e-12, is_layer_norm=False)
    assert np.isinf(expected.error).tolist() == [is_any]
    scale = np.float32(1 / np.sqrt((rows.astype(float) ** 2).mean() + 1e-12))
    with np.errstate(over="ignore"):
        found = rows * weights * scale
    assert difference(found.astype(float), expected) == ""


def test_each_expert_rounds_the_sum_with_the_shared_result() -> None:
    m = Mixture(
        num=4, top_k=4, count=1, columns=1, width=1, bits=32, kind=2, function=1, is_normalized=True, has_gate=False
    )
    shared, part = np.ones((1, 1)), np.full((1, 1), 0.99 * EPS)
    total = shared.astype(np.float32)
    for _ in range(m.top_k):
        total += part.astype(np.float32)
    assert total.item() == 1.0
    expected = with_shared(m, Bounded.of(m.top_k * part), Bounded.of(shared))
    assert difference(total.astype(float), expected) == ""
    assert difference(total - 5 * EPS, expected) != ""


def test_groups_name_builds(capsys: pytest.CaptureFixture[str]) -> None:
    assert {each.name for each in chosen(["thread"])} == {"gcc-x86-64-thread", "clang-x86-64-thread"}
    assert set(GROUPS["all"]) == set(BUILDS) - {"quick"}
    assert len(GROUPS["plain"]) == 11
    assert main(["--builds", "no-such"]) == 2
    assert "no-such" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--programs", "0"], ["--programs", "x"], ["--only", "-1"], ["--seed", "-1"]])
def test_numbers_that_make_no_sense_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert f"argument {words[0]}: invalid" in capsys.readouterr().err
