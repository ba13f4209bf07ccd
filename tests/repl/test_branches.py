"""`/rewind` and `/fork` at the prompt and in the app."""

from __future__ import annotations

import asyncio

from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from streamchat.base.requests import Fork, Rewind, Submit
from streamchat.config.loader import Configuration
from streamchat.repl.prompt import Prompt
from tests.support.app_driver import driving
from tests.support.scripted_engine import ScriptedEngine


async def test_the_prompt_continues_after_a_rewind_and_a_fork() -> None:
    engine = ScriptedEngine(["one", "two", "three", "four", "five"])
    lines = [
        "a",
        "b",
        "c",
        "/rewind 1",
        "/rewind",
        "/rewind 9",
        "/rewind 1 no",
        "/fork 7",
        "d",
        "/fork 1",
        "e",
        "/quit",
    ]
    with create_pipe_input() as typed, create_app_session(input=typed, output=DummyOutput()):
        typed.send_text("".join(f"{line}\r" for line in lines))
        try:
            assert await asyncio.wait_for(Prompt(engine, Configuration(engine.settings, {})).run(), 60) == 0
        finally:
            engine.close()
    asked = [request for request in engine.sent if isinstance(request, Rewind | Fork | Submit)]
    assert asked == [*map(Submit, "abc"), Rewind(1), Submit("d"), Fork(1), Submit("e")]


async def test_rewound_turns_leave_the_screen_and_a_fork_replaces_it() -> None:
    async with driving(ScriptedEngine(["first", "second", "third", "fourth"])) as driver:
        for text in ("one", "two", "three"):
            await driver.ask(text)
        await driver.enter("/rewind 1")
        await driver.until(lambda: any("Back at turn 1; 2 turns were undone." in line for line in driver.lines))
        assert [turn.text for turn in driver.turns] == ["one"]
        assert driver.board.turns == 1
        assert "/resume later1 continues with the undone turns" in driver.lines[-1]
        await driver.ask("four")
        await driver.enter("/fork 1")
        await driver.until(lambda: [turn.text for turn in driver.turns] == ["one"])
        assert driver.board.session == "forked"
        await driver.until(
            lambda: "“one” (forked), a fork of saved1 after turn 1, resumed at turn 1" in driver.lines[-1]
        )
