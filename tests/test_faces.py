"""The command through a pipe and through a pseudo-terminal, and the app on a real engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

from streamchat.chat.engine import Engine
from streamchat.config import Configuration
from streamchat.settings import Settings
from tests.app_driver import driving
from tests.real_engine import tiny_loaded

FACE = Path(__file__).with_name("scripted_face.py")


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


async def test_the_app_on_a_real_engine_shows_what_the_layers_hold() -> None:
    settings = Settings(cache_size=128, max_new_tokens=12, seed=1)
    engine = Engine(Configuration(settings, {}, None), lambda *_: tiny_loaded())
    async with driving(engine) as driver:  # type: ignore[arg-type]
        await driver.ready()
        for number in range(1, 9):
            await driver.enter(f"Tell me story {number} about the sea and the dragon.")
            await driver.until(lambda n=number: driver.app.board.turns == n and not driver.app.board.busy, "the turn")
        conversation = engine._conversation
        assert conversation is not None
        cache = conversation.cache
        await driver.until(
            lambda: driver.figures("cache")["length / budget"] == f"{cache.lengths[0]} / 128", "the figures"
        )
        assert cache.lengths == [cache.length] * 3
        assert driver.figures("cache")["compressions"] == str(cache.compression_count)
        assert cache.compression_count > 2
        assert driver.turns[0].memory.forgotten


@pytest.mark.model
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
