"""The test double keeps the promises of the engine; the tests of the faces lean on them."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

import pytest

from streamchat.base import events as ev
from streamchat.base.requests import Stop, Submit
from streamchat.config.settings import Settings
from streamchat.engine.engine import Engine
from streamchat.engine.protocol import ChatEngine
from tests.support.scripted_engine import Reply, ScriptedEngine

E = TypeVar("E", bound=ev.Event)


def of_type(engine: ScriptedEngine, kind: type[E]) -> list[E]:
    return [event for event in engine.events if isinstance(event, kind)]


def parameters_of(method: Any) -> list[tuple[str, object, object]]:
    """(name, kind, default) of each."""
    return [(each.name, each.kind, each.default) for each in inspect.signature(method).parameters.values()]


@pytest.mark.parametrize("kind", [ScriptedEngine, Engine])
def test_each_engine_has_what_the_protocol_names(kind: type[ChatEngine]) -> None:
    promised = {name: member for name, member in vars(ChatEngine).items() if not name.startswith("_")}
    assert {"settings", "busy", "subscribe", "start", "send", "close"} <= promised.keys()
    for name, member in promised.items():
        if isinstance(member, property):
            assert isinstance(getattr(kind, name), property), name
        else:
            assert parameters_of(getattr(kind, name)) == parameters_of(member), name


def test_loads_answers_and_closes_in_order() -> None:
    engine = ScriptedEngine(["Hello there."], sample_s=0)
    seen: list[ev.Event] = []
    engine.subscribe(seen.append)
    engine.send(Submit("hi"))  # allowed before it is ready
    engine.start()
    assert engine.wait_idle()
    assert engine.close(60)
    kinds = [type(event).__name__ for event in seen if not isinstance(event, ev.StatusSampled)]
    assert kinds[:3] == ["ModelLoading", "ModelLoading", "ModelReady"]
    assert kinds[3:] == [
        "TurnStarted",
        "PrefillProgress",
        "TextDelta",
        "TextDelta",
        "TurnFinished",
        "EngineClosed",
    ]


def test_budget_is_kept_and_evictions_name_their_turns() -> None:
    text = " ".join(["word"] * 30)
    engine = ScriptedEngine(lambda message: text, settings=Settings(cache_size=128, num_sink_tokens=4))
    engine.start()
    for number in range(12):
        engine.send(Submit(f"question {number}"))
    assert engine.wait_idle()
    engine.close()
    samples = of_type(engine, ev.StatusSampled)
    assert max(event.cache.length for event in samples) <= 128
    gone = [turn for event in of_type(engine, ev.TokensEvicted) for turn in event.turns_gone]
    assert gone == sorted(set(gone))
    assert gone[0] == 1


def test_stop_keeps_the_text_or_rolls_back() -> None:
    engine = ScriptedEngine([Reply("one two three", hold_after=2), Reply("never", hold_after=0)], sample_s=0)
    engine.start()
    for turn, (expected, rolled_back) in enumerate([("one two ", False), ("", True)], start=1):
        engine.send(Submit("go"))
        # the sample comes right before the hold
        assert engine.wait_event(ev.TextDelta, 2) if expected else engine.wait_event(ev.PrefillProgress, turn)
        engine.send(Stop())
        assert engine.wait_idle()
        finished = of_type(engine, ev.TurnFinished)[-1]
        assert isinstance(finished, ev.TurnFinished)
        assert (finished.finish_reason, finished.reply, finished.rolled_back) == ("cancelled", expected, rolled_back)
    engine.close()


def test_failures_end_the_engine() -> None:
    failure = ev.EngineFailed("Model not available", "no such model", 3)
    engine = ScriptedEngine(load_failure=failure)
    engine.start()
    assert engine.close(60)
    assert engine.events[-2:] == [failure, ev.EngineClosed()]
