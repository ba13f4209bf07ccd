"""What each slash command answers and asks of the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streamchat.base import events as ev
from streamchat.base.requests import Clear, Pin, Request, SetOption, SetSystemPrompt, SwitchModel, Unpin
from streamchat.frontend.slash.commands import default_registry
from streamchat.frontend.slash.registry import parse
from tests.support.desk import Desk


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("/clear", Clear()),
        ("/new", Clear()),
        ("/system Be brief.", SetSystemPrompt("Be brief.")),
        ("/system none", SetSystemPrompt("")),
        ("/set temperature 0.2", SetOption("temperature", 0.2)),
        ("/set top-k=40", SetOption("top_k", 40)),
        ("/set thinking show", SetOption("thinking", "show")),
        ("/model pythia-410m", SwitchModel("pythia-410m")),
        ("/pin", Pin(3)),
        ("/pin 2", Pin(2)),
        ("/unpin 2", Unpin(2)),
    ],
)
def test_commands_ask_the_engine(text: str, call: Request) -> None:
    desk = Desk()
    assert not desk.say(text).error
    assert desk.engine.sent == [call]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("/nonsense", "/nonsense is not a command"),
        ("/cler", "did you mean /clear?"),
        ("/set nonsense 1", "nonsense is not a setting"),
        ("/set temperature hot", "temperature must be a number"),
        ("/set temperature 99", "temperature = 99.0 is not valid"),
        ("/set cache_size 5", "cannot change during a chat"),
        ("/pin first", "first is not a turn number"),
        ("/pin 0", "0 is not a turn number"),
        ("/read", "usage: /read FILE"),
        ("/read missing.txt", "missing.txt: no such file"),
        ("/help nonsense", "nonsense is not a command"),
    ],
)
def test_wrong_ones_are_one_sentence_and_ask_nothing(text: str, sentence: str) -> None:
    desk = Desk()
    result = desk.say(text)
    assert result.error
    assert sentence in result.text
    assert desk.engine.sent == []


def test_pinning_before_anything_was_said() -> None:
    assert Desk(turns=0).say("/pin").text == "no turn yet"


def test_unpinning_needs_no_number_where_one_is_pinned() -> None:
    desk = Desk()
    desk.board.cache = ev.CacheState(segments=(ev.Segment("user", 2, 5, 5, True), ev.Segment("user", 3, 5, 5)))
    desk.say("/unpin")
    assert desk.engine.sent == [Unpin(2)]
    assert desk.offered("/unpin ") == ["/unpin 2"]
    assert desk.offered("/pin ") == ["/pin 3"]
    desk.board.cache = ev.CacheState(segments=(ev.Segment("user", 2, 5, 5, True), ev.Segment("user", 3, 5, 5, True)))
    assert desk.say("/unpin").text == "turns 2, 3 are pinned; choose one: /unpin 3"


def test_model_without_a_name_lists_the_models_as_text() -> None:
    desk = Desk()
    desk.board.apply(ev.ModelReady(desk.engine._info(), 1.0))
    first, _, headings, *rows = desk.say("/model").text.splitlines()
    assert first == "SmolLM2-135M-Instruct (float32 on cpu), from a scripted engine"
    assert headings.split() == ["model", "size", "context"]
    assert any(row.split()[:1] == ["pythia-410m"] and "fetch" in row for row in rows)
    assert rows[-1] == "/model NAME loads one and starts over."


def test_answers() -> None:
    desk = Desk()
    assert desk.say("/system").text == "system prompt: Be kind."
    assert desk.say("/set temperature").text.startswith("temperature = 0.7  (Sampling temperature")
    assert "min_p = 0.0" in desk.say("/set").text
    desk.engine.origins = {"temperature": "the catalogue"}
    assert desk.say("/set temperature").text.endswith("; source: the catalogue)")
    rows = desk.say("/set").text.splitlines()
    assert next(row for row in rows if row.startswith("temperature")).endswith("; source: the catalogue)")
    assert next(row for row in rows if row.startswith("min_p")).endswith("; source: the default)")
    assert desk.say("/model").text == "default is loading"
    assert "cached  " in desk.say("/stats").text
    assert desk.say("/quit").quit
    for command in desk.registry:
        assert f"/{command.name}" in desk.say("/help").text
        assert command.help in desk.say(f"/help {command.name}").text


def test_reading_files() -> None:
    Path("notes.txt").write_text("one")
    desk = Desk()
    assert desk.say("/read notes.txt").insert == "@notes.txt "
    assert desk.say("/read notes.txt").text == "notes.txt (1 line, 3 B) will be attached to your next message"
    assert desk.say("/read notes.txt what is this?").message == "@notes.txt what is this?"
    assert desk.offered("/read no") == ["/read notes.txt"]


def test_completion() -> None:
    desk = Desk()
    assert "/pin" in desk.offered("/p")
    assert desk.offered("/set tempe") == ["/set temperature"]
    assert desk.offered("/set thinking ") == [f"/set thinking {mode}" for mode in ("collapse", "show", "hide")]
    assert desk.offered("/set thinking h") == ["/set thinking hide"]
    assert desk.offered("/set temperature ") == desk.offered("/set cache_size ") == desk.offered("/set x ") == []
    assert "/model pythia-410m" in desk.offered("/model pythia-4")
    assert desk.offered("//x") == []


def test_models_that_are_here_are_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    from streamchat.frontend import model_names
    from streamchat.models import hub_cache

    here = [
        hub_cache.CachedModel("EleutherAI/pythia-14m", Path(), 53_000_000),
        hub_cache.CachedModel("someone/Own-Model", Path(), 2_000_000),
    ]
    monkeypatch.setattr(hub_cache, "cached_models", lambda: here)
    model_names._known_models.cache_clear()
    try:
        desk = Desk()
        offered = dict(desk.registry.completions(desk.context, "/model "))
        assert offered["/model pythia-14m"] == "EleutherAI/pythia-14m (cached, 53.0 MB on disk)"
        assert offered["/model pythia-31m"] == "EleutherAI/pythia-31m"
        assert desk.offered("/model SOME") == ["/model someone/Own-Model"]
    finally:
        model_names._known_models.cache_clear()
    Path("tiny").mkdir()
    assert desk.offered("/model ./t") == ["/model ./tiny/"]


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("/help me", ("help", "me")), ("/usr/bin/env", None), ("//x", None), ("hello /clear", None), ("/?", ("?", ""))],
)
def test_what_is_a_command(text: str, parsed: Any) -> None:
    assert parse(text) == parsed


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("//help", "/help"),
        ("//help me, please", "/help me, please"),
        ("//Q\nquits", "/Q\nquits"),
        ("//statz", "/statz"),  # what the answer to an unknown command names
        ("// a comment", "// a comment"),
        ("//TODO fix this\nint main();", "//TODO fix this\nint main();"),
        ("//", "//"),
        ("//server/share", "//server/share"),
        ("///help", "///help"),
        ("/usr/bin/env", "/usr/bin/env"),
        ("hello //help", "hello //help"),
    ],
)
def test_two_slashes_are_one_only_before_a_command(typed: str, message: str) -> None:
    registry = default_registry()
    assert registry.unescape(typed) == message
    assert registry.unescape(registry.escape(message)) == message


def test_which_commands_start_over() -> None:
    registry = default_registry()
    over = {c.name: (c.starts_over(""), c.starts_over("x")) for c in registry}
    assert over["clear"] == (True, True)
    assert over["system"] == over["model"] == (False, True)
    assert not any(any(v) for name, v in over.items() if name not in ("clear", "system", "model"))
