"""Chat templates cut at the marks: templates here are plain functions of the messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from streamchat.conversation.template.cutting import Parts, conversation, first_system, measure, natural_close, split
from streamchat.conversation.template.rendering import UnusableTemplateError

pytestmark = pytest.mark.smoke

Messages = Sequence[dict[str, Any]]


def render(messages: Messages, *, generation: bool = False) -> str:
    """The template that the others deviate from."""
    written = "".join(f"<{each['role']}>{each['content']}</{each['role']}>" for each in messages)
    return f"{written}<assistant>" if generation else written


def changed(change: Callable[[Messages, str], str]) -> Any:
    """The template with a change of what it writes."""
    return lambda messages, generation=False: change(messages, render(messages, generation=generation))


BETWEEN = ("</user><assistant>", "</user><assistant>", "</assistant><user>", True)


def test_the_parts_of_a_template() -> None:
    assert measure(render, with_system=True) == Parts("<system>", "</system><user>", *BETWEEN)  # type: ignore[arg-type]
    assert measure(render, with_system=False) == Parts("<user>", "", *BETWEEN)  # type: ignore[arg-type]


def _fails_at(count: int) -> Any:
    def template(messages: Messages, text: str) -> str:
        if len(messages) == count:
            raise UnusableTemplateError("too long")
        return text

    return changed(template)


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        (changed(lambda _, text: text), ("<user>", "", *BETWEEN)),
        (_fails_at(9), ("<user>", "", *BETWEEN)),
        (_fails_at(7), ("<user>", "", *BETWEEN[:3], False)),
        (_fails_at(5), ("<user>", "", *BETWEEN[:3], False)),
        # the newest turn decides, and a single message does for what is before it
        (
            changed(lambda messages, text: text.replace("</user><assistant>", f"</{len(messages)}>")),
            ("<user>", "", "</3>", "</3>", BETWEEN[2], False),
        ),
        (changed(lambda messages, text: f"{min(len(messages), 3)}{text}"), ("1<user>", "", *BETWEEN[:3], False)),
        (changed(lambda messages, text: f"{min(len(messages), 5)}{text}"), ("1<user>", "", *BETWEEN[:3], False)),
        (changed(lambda messages, text: f"{len(messages) // 7}{text}"), ("0<user>", "", *BETWEEN[:3], False)),
        (
            changed(lambda messages, text: f"{text}{len(messages) // 3}"),
            ("<user>", "", BETWEEN[0] + "1", *BETWEEN[1:3], False),
        ),
    ],
)  # fmt: skip
def test_turns_are_like_the_newest_of_two(template: Any, parts: Any) -> None:
    assert measure(template, with_system=False) == Parts(*parts)


def _swapped(messages: Messages, text: str) -> str:
    return render([*messages[::-1]], generation=True)


@pytest.mark.parametrize(
    "template",
    [
        changed(lambda messages, text: text.replace(messages[0]["content"], "")),
        changed(lambda messages, text: text + messages[0]["content"]),  # the system prompt, after the messages
        changed(lambda messages, text: messages[0]["content"] + text),  # twice before them
        changed(lambda messages, text: text + messages[-1]["content"]),
        changed(lambda messages, text: f"{text}{len(messages[-1]['content'])}"),
        changed(lambda messages, text: f"{text}{len(messages[2]['content']) if len(messages) == 4 else ''}"),
        changed(_swapped),
        _fails_at(2),
        _fails_at(4),
    ],
)
def test_a_template_that_does_not_write_each_text_once_and_in_order_is_refused(template: Any) -> None:
    with pytest.raises(UnusableTemplateError):
        measure(template, with_system=True)


def test_what_closes_the_last_reply() -> None:
    assert natural_close(render) == "</assistant>"  # type: ignore[arg-type]
    assert natural_close(changed(lambda messages, text: text + "<end>")) == "</assistant><end>"
    assert natural_close(changed(lambda messages, text: text + messages[0]["content"])) == ""
    assert natural_close(_fails_at(2)) == ""


def test_what_is_around_the_system_prompt() -> None:
    assert first_system(render) == ("<system>", "</system><user>")  # type: ignore[arg-type]
    alone = changed(lambda messages, text: "".join(f"{each['content']};" for each in messages))
    assert first_system(alone) == ("", ";")
    moves = changed(lambda messages, text: text if len(messages) == 2 else render(messages[1:], generation=True))
    assert first_system(moves) == ("<system>", "</system><user>")


@pytest.mark.parametrize(
    "template",
    [
        changed(lambda messages, text: render(messages[1:])),
        changed(lambda messages, text: f"{messages[0]['content']}{text}"),
        changed(lambda messages, text: f"{len(messages[0]['content'])}{text}"),
        changed(_swapped),
    ],
)
def test_a_system_prompt_without_a_place_before_the_message_is_refused(template: Any) -> None:
    with pytest.raises(UnusableTemplateError):
        first_system(template)


def test_a_conversation_alternates_after_the_system_prompt() -> None:
    user, assistant = ({"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b")))
    assert conversation([]) == []
    assert conversation(["a", "b", "a"]) == [user, assistant, user]
    assert conversation(["a"], "") == [{"role": "system", "content": ""}, user]


@pytest.mark.parametrize(
    ("text", "marks", "pieces"),
    [
        ("text", [], ["text"]),
        ("1a22b333", ["a", "b"], ["1", "22", "333"]),
        ("aab", ["aa", "b"], ["", "", ""]),
        ("1b2a3", ["a", "b"], None),
        ("1a2", ["a", "b"], None),
        ("1b2", ["a", "b"], None),
        ("1a2b3a", ["a", "b"], None),
        ("1a2b3b", ["a", "b"], None),
    ],
)
def test_a_text_is_cut_at_marks_that_it_has_once_and_in_order(text: str, marks: list[str], pieces: Any) -> None:
    if pieces is None:
        with pytest.raises(UnusableTemplateError):
            split(text, marks)
    else:
        assert split(text, marks) == pieces
