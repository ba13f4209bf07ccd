"""`/think` and `/set template_args`: what they ask of the engine and what they answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from streamchat.base.requests import SetOption
from tests.support.desk import Desk


def desk_with(**info: Any) -> Desk:
    """A desk whose model has this template."""
    desk = Desk()
    desk.board.info = replace(desk.engine._info(), **info)
    return desk


@pytest.mark.parametrize("name", ["enable_thinking", "thinking", "reasoning"])
@pytest.mark.parametrize(("word", "value"), [("on", "true"), ("OFF", "false")])
def test_think_sets_the_switch_of_the_template_and_keeps_other_arguments(name: str, word: str, value: str) -> None:
    desk = desk_with(template_reads=("aspect", name))
    desk.engine._settings = replace(desk.engine.settings, template_args='{"aspect": 1}')
    assert desk.say(f"/think {word}").text == f"{name}={value}, starting with the next turn"
    assert desk.engine.sent == [SetOption("template_args", f'{{"aspect": 1, "{name}": {value}}}')]


def test_think_sets_the_effort_of_a_template_that_takes_one() -> None:
    desk = desk_with(template_reads=("reasoning_effort",))
    assert not desk.say("/think low").error
    assert desk.engine.sent == [SetOption("template_args", '{"reasoning_effort": "low"}')]
    assert desk.say("/think off").text == "usage: /think low|medium|high"
    assert desk.offered("/think ") == ["/think low", "/think medium", "/think high"]
    assert "reasoning_effort is low" in desk.say("/think").text
    assert "reasoning_effort is not set" in desk_with(template_reads=("reasoning_effort",)).say("/think").text


@pytest.mark.parametrize(
    ("info", "given", "said"),
    [
        ({"thinks": True}, "{}", "reasoning is on (the chat template's default)"),
        ({"thinks": False}, "{}", "reasoning is off (the chat template's default)"),
        ({"thinks": True}, '{"enable_thinking": false}', "reasoning is off (enable_thinking=false)"),
        (
            {"thinks": True, "template_defaults": '{"enable_thinking": false}'},
            "{}",
            "reasoning is off (enable_thinking=false, the catalogue's default for this model)",
        ),
    ],
)
def test_think_says_what_holds_and_why(info: dict[str, Any], given: str, said: str) -> None:
    desk = desk_with(template_reads=("enable_thinking",), **info)
    desk.engine._settings = replace(desk.engine.settings, template_args=given)
    assert desk.say("/think").text.splitlines() == [said, "/think on|off changes it"]
    assert desk.engine.sent == []


def test_without_a_switch_think_says_so_and_asks_nothing() -> None:
    desk = desk_with()
    assert desk.say("/think on").error
    assert desk.say("/think off").text == "this model's chat template has no switch for reasoning"
    assert "without a chat template" in desk_with(chat_format="plain").say("/think on").text
    assert Desk().say("/think").text == "the model is not ready yet"
    assert desk_with(template_reads=("thinking",)).say("/think maybe").text == "usage: /think on|off"
    assert desk.engine.sent == []


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ('/set template_args {"a": [1, "x=y"]}', '{"a": [1, "x=y"]}'),
        ("/set template_args a=1 b=two", '{"a": 1, "b": "two"}'),
        ("/set template_args=a=1", '{"a": 1}'),
        ("/set template_args {}", "{}"),
    ],
)
def test_set_takes_a_json_object_or_words(typed: str, value: str) -> None:
    desk = Desk()
    assert not desk.say(typed).error
    assert desk.engine.sent == [SetOption("template_args", value)]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("/set template_args messages=1", "messages is reserved"),
        ("/set template_args loud", "'loud' is not NAME=VALUE"),
        ('/set template_args {"a": NaN}', "NaN is not JSON"),
        ("/set template_args [1]", "'[1]' is not NAME=VALUE"),
        ('/set template_args {"a": 1', "is not a JSON object"),
    ],
)
def test_wrong_arguments_are_one_sentence(typed: str, said: str) -> None:
    desk = Desk()
    assert said in desk.say(typed).text
    assert desk.engine.sent == []
