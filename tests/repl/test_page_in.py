"""`/keep N` at the prompt, when the turn is paged in instead of quoted, or another front end pages one in."""

from __future__ import annotations

import asyncio

from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from streamchat.base import events as ev
from streamchat.base.requests import Quote, Submit
from streamchat.config.loader import Configuration
from streamchat.repl.prompt import Prompt
from tests.support.scripted_engine import Reply, ScriptedEngine

PAGED_IN = ev.TurnPagedIn(7, 10, 0.1, ev.CacheState())


class PagesIn(ScriptedEngine):
    """Pages in every turn that is to be quoted."""

    def _do_quote(self, text: str, reply: str, pin: bool) -> None:
        self.emit(PAGED_IN)


async def test_the_prompt_continues_after_a_turn_was_paged_in() -> None:
    engine = PagesIn()
    with create_pipe_input() as typed, create_app_session(input=typed, output=DummyOutput()):
        typed.send_text("/keep a text\rhello\r/quit\r")
        try:
            assert await asyncio.wait_for(Prompt(engine, Configuration(engine.settings, {})).run(), 20) == 0
        finally:
            engine.close()
    kinds = [type(request) for request in engine.sent if isinstance(request, Quote | Submit)]
    assert kinds == [Quote, Submit]


async def test_a_turn_that_another_front_end_pages_in_does_not_end_the_own_one() -> None:
    engine = ScriptedEngine([Reply("a reply", hold_after=1)])
    with create_pipe_input() as typed, create_app_session(input=typed, output=DummyOutput()):
        typed.send_text("first\r")
        running = asyncio.ensure_future(Prompt(engine, Configuration(engine.settings, {})).run())
        try:
            assert await asyncio.to_thread(engine.wait_event, ev.TextDelta)
            engine.emit(PAGED_IN)
            typed.send_text("second\r/quit\r")
            await asyncio.sleep(0.3)
            assert engine.submitted == ["first"]
            engine.release()
            assert await asyncio.wait_for(running, 20) == 0
        finally:
            running.cancel()
            engine.release()
            engine.close()
    assert engine.submitted == ["first", "second"]
