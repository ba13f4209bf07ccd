"""Rendering of chat templates: limits on their output, templates without a default, the fixed clock, and marks."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from streamchat.conversation.template.rendering import (
    MARK,
    Renderer,
    UnusableTemplateError,
    new_mark,
    new_marks,
    render,
)
from tests.support import toy_tokenizer as toy

pytestmark = pytest.mark.smoke

MESSAGE = {"role": "user", "content": "Hi"}
WRITES = "{{ 'a' * count }}"


@pytest.mark.parametrize("tools", [[], [{"name": "weather"}]])
def test_a_template_may_add_200_000_characters_and_repeat_what_it_gets_20_times(tools: list[Any]) -> None:
    tokenizer = toy.toy_tokenizer(WRITES)
    longest = 200_000 + 20 * (len(str(MESSAGE)) + sum(len(str(tool)) for tool in tools))
    options: dict[str, Any] = {"tools": tools} if tools else {}
    assert render(tokenizer, [MESSAGE], count=longest, **options) == "a" * longest
    with pytest.raises(UnusableTemplateError) as raised:
        render(tokenizer, [MESSAGE], count=longest + 1, **options)
    assert str(raised.value) == f"it writes {longest + 1:,} characters for 1 messages"


def test_a_template_beyond_a_limit_is_never_rendered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, rendered = toy.toy_tokenizer(WRITES), list[int]()
    apply = tokenizer.apply_chat_template

    def counted(messages: Any, *, count: int, **options: Any) -> Any:
        rendered.append(count)
        return apply(messages, count=count, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", counted)
    assert render(tokenizer, [MESSAGE], count=1) == "a"
    for count in (2_000_000, 1):
        with pytest.raises(UnusableTemplateError, match="it writes 2,000,000 characters"):
            render(tokenizer, [MESSAGE], count=count)
    assert rendered == [1, 2_000_000]


def test_a_template_that_raises_may_be_rendered_again() -> None:
    tokenizer = toy.toy_tokenizer("{% if no %}{{ raise_exception('no chat today') }}{% endif %}yes")
    with pytest.raises(UnusableTemplateError, match="it raises: no chat today"):
        render(tokenizer, [MESSAGE], no=True)
    assert render(tokenizer, [MESSAGE], no=False) == "yes"


def test_several_templates_without_a_default_are_unusable() -> None:
    tokenizer = toy.toy_tokenizer()
    tokenizer.chat_template = {"tool_use": toy.CHATML, "rag": toy.CHATML}
    with pytest.raises(UnusableTemplateError):
        Renderer(tokenizer, datetime(2001, 2, 3))


@pytest.mark.parametrize("quote", ["'", '"'])
@pytest.mark.parametrize("start", ["", "\n"])
def test_the_clock_shows_the_given_time(quote: str, start: str) -> None:
    written = start + "{{ strftime_now('%d %b %Y') }}, {{ strftime_now('today') }}; {{ add_generation_prompt }}"
    renderer = Renderer(toy.toy_tokenizer(written.replace("'", quote)), datetime(2001, 2, 3))
    assert renderer.has_clock
    assert renderer([MESSAGE]) == f"{start}03 Feb 2001, today; False"
    assert renderer([MESSAGE], generation=True) == f"{start}03 Feb 2001, today; True"


def test_arguments_and_tools_reach_the_template() -> None:
    written = "{{ mode }}{% for tool in tools or [] %} {{ tool.name }}{% endfor %}"
    renderer = Renderer(toy.toy_tokenizer(written), datetime(2001, 2, 3), {"mode": "deep"})
    assert not renderer.has_clock
    assert renderer([MESSAGE], tools=[{"name": "weather"}]) == "deep weather"
    assert renderer([MESSAGE]) == "deep"


def test_marks_are_found_and_differ() -> None:
    for marks, length in ((new_marks(), 14), (new_marks(17), 36)):
        assert len(marks.all) == len(set(marks.all)) == 9
        assert (len(marks.users), len(marks.replies)) == (4, 4)
        assert marks.all == (marks.system, *marks.users, *marks.replies)
        assert all(MARK.fullmatch(mark) and len(mark) == length for mark in marks.all)
    assert MARK.fullmatch(new_mark())
    assert len(new_mark(17)) == 36
