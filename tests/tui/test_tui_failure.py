"""What can go wrong under the app: a plain sentence, the log named, the chat usable, the terminal as it was."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pexpect
import pytest
import torch

from streamchat.base.errors import ModelNotFoundError
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.engine.engine import Engine
from streamchat.telemetry.log_file import log_path, start_logging
from streamchat.tui.widgets.lines import FailurePanel
from tests.support.app_driver import Driver, driving
from tests.support.program import output_of
from tests.support.real_engine import conversation_of, tiny_loaded

SETTINGS = Settings(cache_size=128, max_new_tokens=6, seed=1)


@asynccontextmanager
async def real(load: Callable[..., Any] = lambda *_: tiny_loaded(), ready: bool = True) -> AsyncIterator[Driver]:
    """The app on a real engine with a tiny model."""
    start_logging()
    engine = Engine(Configuration(SETTINGS, {}, None), load)
    async with driving(engine, ready=ready) as driver:
        yield driver


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


def nan(output: Any) -> Any:
    output.logits = torch.full_like(output.logits, float("nan"))
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook", "sentence"),
    [
        (raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")), "out of memory in turn"),
        (raising(MemoryError()), "out of memory in turn 2"),
        (lambda module, args, output: nan(output), "the model produced NaN/inf logits; the turn was rolled back"),
        (raising(ZeroDivisionError("a kernel\nwith two lines")), "rolled back: ZeroDivisionError: a kernel"),
    ],
)
async def test_a_turn_that_fails_is_said_and_the_chat_goes_on(hook: Callable[..., Any], sentence: str) -> None:
    async with real() as driver:
        await driver.ask("The sea.")
        handle = conversation_of(driver.real_engine).model.register_forward_hook(hook)
        await driver.enter("The dragon and the king.")
        await driver.until(lambda: "Your message is back in the input." in driver.lines)
        handle.remove()
        assert any(sentence in line for line in driver.lines)
        assert any(str(log_path()) in line for line in driver.lines)
        assert not any("Traceback" in line or "\n" in line for line in driver.lines)
        assert "Traceback" in log_path().read_text()
        assert len(driver.turns) == 1
        assert driver.prompt.text == "The dragon and the king."  # to be sent again
        await driver.pilot.press("enter")
        await driver.until(lambda: driver.finished == 2)


@pytest.mark.parametrize(
    ("error", "sentence", "code"),
    [
        (ModelNotFoundError("there is no model xyz"), "there is no model xyz", 3),
        (RuntimeError("boom\nsecond line"), "unexpected RuntimeError: boom", 1),
    ],
)
async def test_a_model_that_cannot_be_loaded(error: Exception, sentence: str, code: int) -> None:
    async with real(raising(error), ready=False) as driver:
        await driver.until(lambda: driver.conversation.query(FailurePanel))
        assert sentence in driver.screen_text
        assert "log: " in driver.screen_text
        assert "second line" not in driver.screen_text
        assert "Traceback" in log_path().read_text()
        await driver.enter("/pin 1")
        await driver.until(lambda: "the engine has stopped; press Ctrl+Q to quit" in driver.toasts)
        driver.prompt.put("")
        await driver.enter("/stats")  # needs no engine
        await driver.until(lambda: driver.outputs)
        await driver.write("a draft")
        await driver.pilot.press("ctrl+q")
        await driver.until(lambda: not driver.app.is_running)
    assert driver.app.return_value == code


BROKEN_APP = """
import sys
sys.path.insert(0, ROOT)
from streamchat.cli import main as cli
from streamchat.tui.screens.chat import ChatScreen
from tests.support.scripted_engine import ScriptedEngine
def broken(self):
    raise ZeroDivisionError("in the interface")
ChatScreen.action_follow = broken
cli.make_engine = lambda configuration, *_: ScriptedEngine(settings=configuration.settings)
sys.exit(cli.main([]))
""".replace("ROOT", repr(str(Path(__file__).parents[2])))


@pytest.mark.slow
@pytest.mark.parametrize("debug", [False, True])
def test_a_bug_of_the_interface_is_one_sentence(debug: bool) -> None:
    env = {**os.environ, "TERM": "xterm-256color", **({"STREAMCHAT_DEBUG": "1"} if debug else {})}
    child = pexpect.spawn(
        sys.executable, ["-c", BROKEN_APP], timeout=30, dimensions=(40, 200), env=env, encoding="utf-8"
    )
    child.expect("Write a message")
    child.send("\x1b[1;5F")  # Ctrl+End
    child.expect(pexpect.EOF)
    child.close()
    after = output_of(child).rpartition("\x1b[?1049l")[2]
    assert child.exitstatus == 1
    assert "ZeroDivisionError" in after
    assert "in the interface" in after
    assert ("Traceback" in after) == debug
    if not debug:
        assert "the traceback is in" in after
    assert "ZeroDivisionError" in log_path().read_text()
