"""`python -m tools.terminal_walk`: short walks through both front ends, and what a walk would notice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.terminal_walk.__main__ import write_model
from tools.terminal_walk.properties import ScreenProperties
from tools.terminal_walk.steps import FRONT_ENDS, FrontEnd, steps
from tools.terminal_walk.terminal import Terminal
from tools.terminal_walk.walk import Walk

ROOT = Path(__file__).parents[2]
ANY_TIME_S = 1000.0
"""No test asserts a time."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.mark.slow
@pytest.mark.parametrize(("front_end", "seed"), [("app", 19), ("prompt", 26)])
def test_a_short_walk(front_end: FrontEnd, seed: int, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    walk = Walk(front_end, model, ANY_TIME_S)
    walk.take(steps(seed, 24, front_end))
    assert walk.findings.ends[0] >= 1
    assert walk.findings.taken["probe"] >= 1


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_seed_gives_the_same_steps(front_end: FrontEnd) -> None:
    first = [*steps(3, 600, front_end)]
    assert first == [*steps(3, 600, front_end)]
    assert first != [*steps(4, 300, front_end)]
    assert {step.kind for step in first} == {"type", "resize", "pause", "probe", "quit", "terminate"}


SCREEN = ["You · 4", "m3 hello", "╌╌ context starts here ╌╌", "You · 5", "cached   90 / 96 · 93 %"]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["cached   97 / 96 · 101 %"], "the screen shows 97 cached tokens, and the budget is 96"),
        (["figures · cache 1,097/96"], "the screen shows 1097 cached tokens, and the budget is 96"),
        (["(44 tokens evicted, 100 of 96 cached)"], "the screen shows 100 cached tokens, and the budget is 96"),
        (["context starts here", "You · 4"], "turn 4 is in memory again, and turn 4 was evicted"),
        (["context starts here", "x", "context starts inside this turn"], "the screen shows 2 edges of memory"),
    ],
)
def test_what_a_screen_must_not_show(lines: list[str], problem: str) -> None:
    properties = ScreenProperties(96)
    assert list(properties.problems(SCREEN)) == []
    assert list(properties.problems(lines)) == [problem]
    properties.restored()
    assert list(properties.problems(["context starts here", "You · 4"])) == []


def ended(program: str) -> tuple[int | None, list[str]]:
    """Exit code of a Python program on a terminal, and what it left of the terminal."""
    terminal = Terminal(["-c", program], {})
    return terminal.exit_code(60), terminal.unrestored()


def test_a_terminal_that_is_not_restored_is_noticed() -> None:
    assert ended("print('\\x1b[?1049h\\x1b[?25l\\x1b[>1u' + 'x' * 20 + '\\x1b[<u\\x1b[?25h\\x1b[?1049l')") == (0, [])
    code, left = ended(
        "import sys, tty; tty.setraw(0); print('\\x1b[?1049;2004h\\x1b[?25l\\x1b[>1u', flush=True); sys.exit(3)"
    )
    assert code == 3
    assert left == [
        "mode 25 is off",
        "mode 1049 is on",
        "mode 2004 is on",
        "1 keyboard modes are pushed",
        "echo, line editing, or other settings differ",
    ]


def test_a_signal_is_noticed() -> None:
    assert ended("import os; os.kill(os.getpid(), 9)")[0] == -9


def test_half_of_a_wide_character_can_be_overwritten() -> None:
    program = r"import time; print('\u5973\u5973 x\r\ny\u5973\x1b[1;1Ha', flush=True, end=str()); time.sleep(60)"
    terminal = Terminal(["-c", program], {})
    try:
        assert terminal.wait(lambda: terminal.lines()[0].startswith("a"), ANY_TIME_S)
        assert terminal.lines()[:2] == ["a \u5973 x", "y\u5973"]
    finally:
        terminal.kill()
