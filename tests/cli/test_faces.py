"""The command through a pipe and through a pseudo-terminal, and the app on a real engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pexpect
import pytest

from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.engine.engine import Engine
from tests.support.app_driver import driving
from tests.support.program import FACE, output_of
from tests.support.real_engine import conversation_of, tiny_loaded


def test_a_pipe_gets_the_replies_and_nothing_else() -> None:
    scenario = json.dumps({"replies": ["The capital is \x1b[31mParis.", "Two."]})
    result = subprocess.run(
        [sys.executable, str(FACE), scenario],
        input=b"What is the capital of France?\r\n\nand then?",
        capture_output=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == b"The capital is Paris.\nTwo.\n"


def test_the_prompt_streams_stops_and_leaves() -> None:
    """Ctrl+C stops the reply and not the program; Ctrl+D at an empty prompt leaves."""
    scenario = json.dumps({"replies": ["Hello there.", {"text": "one two three", "hold_after": 2}]})
    env = {**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
    child = pexpect.spawn(sys.executable, [str(FACE), scenario, "--plain"], timeout=20, dimensions=(24, 80), env=env)
    child.expect("you> ")
    child.send("hi\r")
    child.expect(r"Hello there\.")
    child.expect("you> ")
    child.send("\x1b[200~first line\nsecond line\x1b[201~\r")
    child.expect("one two")
    child.sendintr()
    child.expect("stopped")
    child.expect("you> ")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def app_on_a_terminal(scenario: dict[str, Any], shows: str = "Write a message") -> pexpect.spawn[str]:
    """The program itself, full screen, with a scripted engine."""
    env = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    command = [str(FACE), json.dumps(scenario)]
    child = pexpect.spawn(sys.executable, command, timeout=30, dimensions=(40, 140), env=env, encoding="utf-8")
    child.expect(shows)
    return child


def ended(child: pexpect.spawn[str]) -> tuple[int | None, int | None, str]:
    """(exit status, signal, last output); the alternate screen was left and the cursor is back."""
    child.expect(pexpect.EOF)
    rest = output_of(child)
    child.close()
    assert "\x1b[?1049l" in rest
    assert "\x1b[?25h" in rest
    return child.exitstatus, child.signalstatus, rest


def test_the_app_uses_the_whole_terminal_and_follows_its_size() -> None:
    child = app_on_a_terminal({"replies": ["Hello there."]}, shows="▾ Cache")  # not at 80 columns
    child.setwinsize(24, 80)
    child.expect("cache ")  # the status line, in its place
    child.setwinsize(5, 20)
    child.setwinsize(40, 140)
    child.expect("▾ Cache")
    child.send("hi\r")
    child.expect("Hello there")
    child.send("\x11")  # Ctrl+Q
    assert ended(child)[:2] == (0, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_app_in_order(name: str) -> None:
    number = getattr(signal, name)
    child = app_on_a_terminal({"replies": [{"text": "word " * 50, "tokens_per_s": 5}]})
    child.send("hi\r")
    child.expect("word")
    child.kill(number)
    assert ended(child)[:2] == (128 + number, None)


def test_an_engine_that_fails_is_a_sentence_on_the_normal_screen_too() -> None:
    failure = {"title": "No model", "message": "no model of that name", "exit_code": 3}
    child = app_on_a_terminal({"load_failure": failure}, shows="No model")
    child.send("\x11")
    status, _, rest = ended(child)
    assert status == 3
    assert "streamchat: no model of that name" in rest
    assert "Traceback" not in rest


@pytest.mark.slow
async def test_the_app_on_a_real_engine_shows_what_the_layers_hold() -> None:
    settings = Settings(cache_size=128, max_new_tokens=12, seed=1)
    engine = Engine(Configuration(settings, {}, None), lambda *_: tiny_loaded())
    async with driving(engine) as driver:
        await driver.ready()
        for number in range(1, 9):
            await driver.enter(f"Tell me story {number} about the sea and the dragon.")
            await driver.answered(number)
        cache = conversation_of(engine).cache
        await driver.until(
            lambda: driver.figures("cache")["cached"].startswith(f"{cache.lengths[0]} / 128 "), "the figures"
        )
        assert cache.lengths == [cache.length] * 3
        assert driver.figures("evicted")["compressions"] == str(cache.compression_count)
        assert cache.compression_count > 2
        assert driver.turns[0].visibility.evicted


@pytest.mark.usefixtures("compiled_kernels")
def test_the_default_model_answers_in_a_pipe(default_model_home: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "streamchat", "--temperature", "0"],
        input="What is the capital of France?\n",
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert result.returncode == 0
    assert "Paris" in result.stdout
    assert len(result.stdout.splitlines()) == 1
