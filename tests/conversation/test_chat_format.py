"""The fixed texts of a format, the texts of messages in it, and the check of both when a model is loaded."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from streamchat.conversation.encoding import ChatEncoder
from streamchat.conversation.template.arguments import TemplateArguments
from streamchat.conversation.template.chat_format import NOTES, ChatFormat
from streamchat.conversation.template.contents import Frame
from streamchat.conversation.template.format import choose_format
from streamchat.conversation.template.format_check import differs, fed
from streamchat.conversation.template.rendering import UnusableTemplateError, new_mark
from tests.support import toy_tokenizer as toy
from tools.template_tokenizers import llama_3

pytestmark = pytest.mark.smoke


def a_format(**changes: Any) -> ChatFormat:
    """A format with the fewest texts."""
    return replace(ChatFormat("plain", "<", "prompt", ">", "first ", "user ", "reply ", "end"), **changes)


def test_what_a_format_is_without_a_template() -> None:
    made = a_format()
    assert (made.reply_open, made.source, made.notes, made.fallbacks, made.renew) == ("", "", (), (), None)
    assert (made.message(" a ", first=True), made.given_reply(" b ")) == (" a ", " b ")
    assert made.system_block == "<prompt>"
    stripped = a_format(strips=True)
    assert (stripped.message(" a "), stripped.given_reply(" b ")) == ("a", "b")


def test_formats_with_the_same_texts_are_equal() -> None:
    same = a_format(contents=SimpleNamespace(), takes=TemplateArguments(("mode",)), renew=a_format)
    assert same == a_format()
    assert hash(same) == hash(a_format())
    assert hash(a_format(arguments={"mode": [1]})) == hash(a_format())  # lists have no hash
    for name in ("system_open", "user_open", "source", "strips", "arguments", "fixed_identity"):
        assert a_format(**{name: "other"}) != a_format()


def test_saved_turns_depend_on_the_texts_around_messages() -> None:
    assert a_format().identity == a_format().parts == ("first ", "user ", "reply ", "end", False)
    assert a_format(fixed_identity=("fixed",)).identity == ("fixed",)
    assert a_format(fixed_identity=("fixed",)).parts == a_format().parts


@pytest.mark.parametrize(
    ("written", "message"), [("written", "written"), ("", ""), (None, "a")], ids=["text", "empty", "unknown"]
)
def test_the_template_decides_how_a_text_is_written(written: str | None, message: str) -> None:
    contents = SimpleNamespace(message=lambda text, first: written, given=lambda text: written)
    made = a_format(contents=contents, strips=True)
    assert (made.message(" a "), made.given_reply(" a ")) == (message, message)
    noted = list[Any]()
    contents.message = lambda *given: noted.append(given)
    for first in (True, False):
        made.message("m", first)
    made.message("m")
    assert noted == [("m", True), ("m", False), ("m", False)]


def test_a_later_format_keeps_what_was_fed() -> None:
    earlier = a_format(fallbacks=("tokens",))
    same = a_format(user_open="U ", fallbacks=("clock",), notes=("a clock",), renew=lambda: a_format(user_open="V "))
    assert same.after(earlier) == same
    assert same.after(earlier).renew() == a_format(user_open="V ")  # type: ignore[misc]
    for name in ("system_open", "system_prompt", "system_close", "first_user_open"):
        old: dict[str, Any] = {name: "old"}
        later = same.after(replace(earlier, **old))
        more: dict[str, Any] = {
            name: "old",
            "fallbacks": ("clock", "start-kept"),
            "notes": ("a clock", NOTES["start-kept"]),
        }
        assert later == replace(same, **more)
        assert later.renew().user_open == "V "  # type: ignore[misc]
        assert getattr(later.renew(), name) == "old"  # type: ignore[misc]
    assert a_format().after(earlier).renew is None


# --- how a template writes a text --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rendered", "content"),
    [
        ("<text>", "text"),
        ("< text\n>", " text\n"),
        ("<>", ""),
        ("<", None),
        (">", None),
        ("text>", None),
        ("<text", None),
        ("", None),
    ],
)
def test_a_text_is_what_is_between_the_frame(rendered: str, content: str | None) -> None:
    given = list[Any]()

    def render(messages: Any, *, generation: bool) -> str:
        given.append((messages, generation))
        return rendered

    frame = Frame(lambda text: [{"content": text}], "<", ">")
    assert frame.content(render, "a") == content  # type: ignore[arg-type]
    assert given == [([{"content": "a"}], True)]


def test_a_frame_does_not_overlap() -> None:
    assert Frame(lambda text: [], "<|", "|>").content(lambda *_, **__: "<|>", "a") is None  # type: ignore[arg-type]


def test_a_template_that_raises_or_repeats_a_mark_does_not_show_how_it_writes_a_text() -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise UnusableTemplateError("no")

    frame, mark = Frame(lambda text: [], "<", ">"), new_mark()
    assert frame.content(fail, "a") is None  # type: ignore[arg-type]
    assert frame.content(lambda *_, **__: f"<{mark}>", "a") is None  # type: ignore[arg-type]
    assert frame.content(lambda *_, **__: f"<{mark}>", mark) == mark  # type: ignore[arg-type]
    assert frame.content(lambda *_, **__: "<b>", mark) == "b"  # type: ignore[arg-type]


# --- the check when a model is loaded ----------------------------------------------------------------------------


def checked(template: str, system: str = "", **changes: Any) -> bool:
    tokenizer = toy.toy_tokenizer(template)
    return differs(tokenizer, replace(choose_format(tokenizer, "template", system), **changes), system)


def test_a_format_that_feeds_what_the_template_writes_does_not_differ() -> None:
    assert not checked(toy.CHATML)
    assert not checked(toy.CHATML, "Be brief.")


@pytest.mark.parametrize(
    "changes",
    [
        {"first_user_open": "<|im_start|>User\n"},
        {"user_open": "<|im_start|>User\n"},
        {"assistant_close": "<|im_end|>"},
        {"generation": "<|im_end|>\n<|im_start|>"},
        {"reply_open": "<|im_end|>\n<|im_start|>model\n"},
        {"system_close": "\n"},
    ],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.parametrize("fallback", [(), ("newest-turn",), ("system-first",)])
def test_a_format_with_another_text_differs(changes: dict[str, str], fallback: Any) -> None:
    """Templates that write earlier turns differently are only compared in the first turn."""
    is_in_first = bool(changes.keys() & {"first_user_open", "generation", "system_close"})
    assert checked(toy.CHATML, "Be brief.", fallbacks=fallback, **changes) is (is_in_first or not fallback)


@pytest.mark.parametrize(
    "start",
    [
        "{% for m in messages %}{% if 'Köln' in m.content %}{{ raise_exception('no') }}{% endif %}{% endfor %}",
        "{% for m in messages %}{% if m.content == 'Blue.' %}{{ raise_exception('no') }}{% endif %}{% endfor %}",
    ],
    ids=["at the first message", "at a reply"],
)
def test_a_template_that_raises_for_some_texts_is_said(start: str) -> None:
    chosen = choose_format(toy.toy_tokenizer(start + toy.CHATML), "template", "")
    assert chosen.fallbacks == ("tokens",)
    assert chosen.notes == (NOTES["tokens"],)


def test_a_template_that_changes_messages_is_said() -> None:
    escaped = toy.CHATML.replace("{{ m['content'] }}", "{{ m['content'] | e }}")
    assert choose_format(toy.toy_tokenizer(escaped), "template", "").fallbacks == ("tokens",)


def test_a_start_token_that_the_tokenizer_adds_to_each_text_is_no_difference() -> None:
    tokenizer = toy.toy_tokenizer(toy.CHATML)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    assert choose_format(tokenizer, "template", "").fallbacks == ()


def test_the_end_of_the_previous_reply_counts_for_the_ids_of_the_next_message() -> None:
    tokenizer = llama_3([*toy.CONTROL])
    tokenizer.chat_template = toy.PARAGRAPHS
    encoder = ChatEncoder(tokenizer, choose_format(tokenizer, "template", ""))
    for history in ([("Is it?", "It is")], [("Is it?", "So.\n")], [("Is it?", "It is."), ("So?", "x\n\n")]):
        messages = [
            {"role": role, "content": text}
            for turn in history
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        messages.append({"role": "user", "content": "Why?"})
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert fed(encoder, history, "Why?") == expected
