"""Arguments of chat templates: which are read, what they change, and that a change leaves what was fed as it is."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from streamchat.base.errors import ConfigError
from streamchat.config.settings import Settings
from streamchat.conversation.assemble import format_from_settings
from streamchat.conversation.encoding import ChatEncoder
from streamchat.conversation.template.arguments import read_names
from streamchat.conversation.template.format import choose_format
from streamchat.conversation.template.format_check import fed
from streamchat.models import catalogue
from tests.support import toy_tokenizer as toy
from tests.support.scripted_model import Chat, make_chat

pytestmark = pytest.mark.smoke

CLOSED = "<think>\n\n</think>\n\n"
WORDS = [("What is the capital?", "Paris."), ("And\nthe sea?", " Blue, mostly.\n")]


@pytest.mark.parametrize(
    ("source", "names"),
    [
        (toy.SWITCHED, ("enable_thinking",)),
        (toy.SWITCHED_AT_THE_START, ("enable_thinking",)),
        (toy.SWITCHED_OFF, ("thinking",)),
        (toy.CHATML, ()),
        # transformers' own block and loop controls; what the chat itself gives is not an argument
        (
            "{% generation %}{{ a }}{% endgeneration %}{{ bos_token }}{{ tools | tojson }}{{ strftime_now('%d') }}",
            ("a",),
        ),
        ("{% for m in messages %}{% if m.x %}{% break %}{% endif %}{{ b }}{% endfor %}", ("b",)),
        # set in each branch before it is read: a variable; read before it is set: an argument
        ("{% if messages %}{% set c = 1 %}{% else %}{% set c = 2 %}{% endif %}{{ c }}", ()),
        ("{% set d = d | default(1) %}{{ d }}", ("d",)),
        ("{% macro f(x) %}{{ x }}{{ y }}{% endmacro %}{{ f(1) }}", ("y",)),
        ("{% for e in messages %}{{ e }}{% set e = 1 %}{% endfor %}{{ e }}", ()),  # the loop sets it first
        ("{% if %}", ()),
    ],
)
def test_the_arguments_that_a_template_reads(source: str, names: tuple[str, ...]) -> None:
    assert read_names(source) == names


@pytest.mark.parametrize("name", ["SWITCHED", "SWITCHED_AT_THE_START", "SWITCHED_OFF"])
@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_fed_ids_are_the_templates_own_with_its_arguments(name: str, value: bool, system: str) -> None:
    tokenizer = toy.toy_tokenizer(getattr(toy, name))
    argument = "thinking" if name == "SWITCHED_OFF" else "enable_thinking"
    chosen = choose_format(tokenizer, "auto", system, {argument: value})
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": "Hello"})
    rendered = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, **{argument: value}
    )
    assert fed(ChatEncoder(tokenizer, chosen), [], "Hello") == rendered
    other = choose_format(tokenizer, "auto", system, {argument: not value})
    assert fed(ChatEncoder(tokenizer, other), [], "Hello") != rendered
    assert other.identity == chosen.identity  # saved ids stay valid


@pytest.mark.parametrize(
    ("name", "thinks"), [("SWITCHED", True), ("SWITCHED_AT_THE_START", True), ("SWITCHED_OFF", False)]
)
def test_whether_a_template_reasons_by_itself_is_measured(name: str, thinks: bool) -> None:
    assert choose_format(toy.toy_tokenizer(getattr(toy, name)), "auto", "").takes.thinks == thinks


def test_an_argument_that_is_not_read_is_said_with_those_that_are() -> None:
    def notes(template: str | None, arguments: dict[str, Any], wanted: str = "auto") -> str:
        return " ".join(choose_format(toy.toy_tokenizer(template), wanted, "", arguments).notes)

    assert "does not read colour; it reads enable_thinking." in notes(toy.SWITCHED, {"colour": 1})
    assert "does not read a and b; it reads no arguments." in notes(toy.CHATML, {"a": 1, "b": 2})
    assert "does not read" not in notes(toy.SWITCHED, {"enable_thinking": False})
    assert 'Without a chat template, arguments have no effect: a="x".' in notes(None, {"a": "x"})
    assert "have no effect" in notes(toy.SWITCHED, {"enable_thinking": False}, "plain")


def change(chat: Chat, **arguments: Any) -> bool:
    """Change the arguments in the middle of a chat; whether it started over."""
    settings = replace(chat.conversation.settings, template_args=json.dumps(arguments))
    chat.conversation.settings = settings
    return chat.conversation.change_format(format_from_settings(chat.tokenizer, settings))


def test_a_change_in_mid_chat_concerns_later_turns_only() -> None:
    chat = make_chat(template=toy.SWITCHED)
    chat.say("one", "first")
    before = chat.cached
    chat.fed.clear()
    assert not change(chat, enable_thinking=False)
    assert not chat.fed
    assert chat.cached == before
    chat.say("two", "second")
    change(chat, enable_thinking=True)
    chat.say("three", "third")
    assert chat.cached[: len(before)] == before
    assert chat.cached_text == (
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nfirst<|im_end|>\n"
        f"<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n{CLOSED}second<|im_end|>\n"
        "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\nthird<|im_end|>\n"
    )
    chat.check()
    assert "start-kept" not in chat.conversation.encoder.format.fallbacks


def test_the_start_of_a_conversation_stays_until_it_is_cleared() -> None:
    chat = make_chat(template=toy.SWITCHED_AT_THE_START, system_prompt="Be brief.")
    chat.say("one", "first")
    assert not change(chat, enable_thinking=False)
    assert [note for note in chat.conversation.encoder.format.notes if "until /clear" in note]
    chat.say("two", "second")
    start = "<|im_start|>system\nMode: /think\nBe brief.<|im_end|>\n"
    turns = (
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nfirst<|im_end|>\n"
        "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\nsecond<|im_end|>\n"
    )
    assert chat.cached_text == start + turns
    change(chat, enable_thinking=True)  # as at the start: nothing deviates any more
    assert "start-kept" not in chat.conversation.encoder.format.fallbacks
    assert chat.conversation.encoder.format.system_block == start
    chat.conversation.undo()
    chat.conversation.undo()
    assert chat.cached_text == start
    assert change(chat, enable_thinking=False)  # without turns it starts over
    chat.say("three", "third")
    assert chat.cached_text.startswith("<|im_start|>system\nMode: /no_think\nBe brief.<|im_end|>\n<|im_start|>user\n")
    chat.check()


def test_reasoning_is_read_as_the_new_arguments_open_it() -> None:
    """With the switch on, this template's prompt opens the reasoning, so the reply starts inside it."""
    chat = make_chat(template=toy.SWITCHED_OFF, added=["<think>", "</think>"])
    assert chat.say("one", "first").reply == "first"
    change(chat, thinking=True)
    outcome = chat.say("two", "Hm.</think>second")
    assert outcome.reply == "<think>\nHm.\n</think>\n\nsecond"


def test_the_catalogue_has_arguments_for_some_models() -> None:
    assert catalogue.template_args_of("qwen3-0.6b") == {"enable_thinking": False}
    assert catalogue.template_args_of("qwen/QWEN3-1.7B") == {"enable_thinking": False}
    assert catalogue.template_args_of("/models/Qwen3-0.6B-Q4_K_M.gguf") == {"enable_thinking": False}
    assert catalogue.template_args_of("smollm2") == {}
    known = {hub_id.rpartition("/")[2] for hub_id in catalogue.ALIASES.values()}
    assert known >= set(catalogue.TEMPLATE_ARGS)

    def arguments(template: str, **settings: Any) -> dict[str, Any]:
        chosen = format_from_settings(toy.toy_tokenizer(template), Settings(model="qwen3-0.6b", **settings))
        return dict(chosen.arguments)

    assert arguments(toy.SWITCHED) == {"enable_thinking": False}
    assert arguments(toy.SWITCHED, template_args='{"enable_thinking": true}') == {"enable_thinking": True}
    assert arguments(toy.CHATML) == {}  # not read, and nothing is said about it
    assert arguments(toy.CHATML, template_args='{"a": 1}') == {"a": 1}


def test_a_template_that_raises_for_an_argument_is_not_used() -> None:
    template = "{% if level | default(1) > 2 %}{{ raise_exception('too high') }}{% endif %}" + toy.CHATML
    with pytest.raises(ConfigError, match="too high"):
        choose_format(toy.toy_tokenizer(template), "template", "", {"level": 3})
