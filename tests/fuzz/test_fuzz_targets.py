"""Every target of `python -m tools.fuzz`: its corpus, with the inputs that once were faults, and changes of it."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator

import psutil
import pytest
from hypothesis import settings

from streamchat.base.errors import ConfigError
from tools.fuzz import check
from tools.fuzz.check import find_fault
from tools.fuzz.minimize import minimized
from tools.fuzz.mutate import mutations
from tools.fuzz.target import Target, load_target, target_names

pytestmark = pytest.mark.fuzz


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Libraries log every damaged file."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.filterwarnings("ignore")  # of libraries, about damaged files
@pytest.mark.parametrize("name", target_names())
def test_any_input_is_accepted_or_refused_with_one_sentence(name: str) -> None:
    target = load_target(name)
    corpus = target.corpus()
    assert corpus
    count = target.suite_runs * (1 if settings().max_examples < 100 else 100)
    for data in [*corpus, *mutations(corpus, target.words, seed=1, count=count, max_bytes=target.max_bytes)]:
        fault = find_fault(target, data, timed=False)
        assert fault is None, f"{fault}; the input is {data!r}"


@pytest.mark.parametrize("name", target_names())
def test_the_corpus_has_what_the_target_starts_from(name: str) -> None:
    target = load_target(name)
    files = {path.name: path for path in target.folder.iterdir()}
    assert files.keys() >= target.seeds().keys()
    assert sum(path.stat().st_size for path in files.values()) < 20_000
    assert all(known in target_names() for known in (path.name for path in target.folder.parent.iterdir()))


def run_odd(data: bytes) -> None:
    """A parser with faults of every kind."""
    if b"!" in data:
        raise ConfigError("")
    if b"?" in data:
        raise KeyError(data.decode())
    if b"=" in data:
        raise ConfigError("x" * 3000)
    if b"X" in data:
        raise SystemExit(3)


ODD = Target("odd", run_odd, lambda: {"a": b"a"}, ())


@pytest.mark.parametrize(
    ("data", "kind", "small"),
    [
        (b"some! text", "sentence", b"!"),
        (b"some? text", "KeyError", b"?"),
        (b"some= text", "sentence", b"="),
        (b"someX text", "SystemExit", b"X"),
    ],
)
def test_a_fault_is_found_and_made_small(data: bytes, kind: str, small: bytes) -> None:
    fault = find_fault(ODD, data)
    assert fault is not None
    assert fault.kind == kind
    assert minimized(ODD, data, fault) == small
    assert find_fault(ODD, b"some text") is None


def test_what_takes_too_much_memory_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MAX_BYTES", 10_000_000)
    below_peak = check._peak_bytes() - psutil.Process().memory_info().rss
    fault = find_fault(Target("odd", lambda data: len(b"a" * (max(0, below_peak) + 60_000_000)), dict, ()), b"a")
    assert fault is not None
    assert fault.kind == "memory"


def test_changes_are_the_same_for_the_same_seed() -> None:
    def changes(seed: int) -> list[bytes]:
        return list(mutations([b"one", b"two"], [b"word"], seed=seed, count=50, max_bytes=100))

    assert changes(1) == changes(1) != changes(2)
    assert all(len(data) <= 100 for data in changes(random.randrange(9)))
