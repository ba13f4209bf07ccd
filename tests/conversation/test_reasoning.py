"""Reasoning recognized from the template, on real ids: texts, special tokens, and what the prompt opens."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamchat.base import events as ev
from streamchat.base.thinking import Tags, split
from streamchat.conversation.encoding import ChatEncoder
from streamchat.conversation.reasoning import ReasoningFormat, ReplyReader, learn_reasoning
from streamchat.conversation.template.format import choose_format
from streamchat.conversation.template.reply_shape import Messages, ReplyShape, learn_shape
from tests.support.scripted_model import Chat, make_chat
from tests.support.toy_tokenizer import CHATML, INSIDE, THINKING, toy_tokenizer

pytestmark = pytest.mark.smoke


def template(opening: str = "", closing: str = "", *, prompt: str = "", key: str = "reasoning_content") -> str:
    """ChatML that writes the reasoning of past replies between these, and `prompt` at the end of a prompt."""
    before = f"{{% if m['{key}'] %}}{opening}{{{{ m['{key}'] }}}}{closing}{{% endif %}}" if opening else ""
    return (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        f"{before}{{{{ m['content'] }}}}<|im_end|>\n{{% endfor %}}"
        f"{{% if add_generation_prompt %}}<|im_start|>assistant\n{prompt}{{% endif %}}"
    )


def reply(chat: Chat, text: str) -> str:
    """What a reply of these ids is shown as."""
    ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    outcome = chat.say("Hello", [*ids, chat.tokenizer.eos_token_id])
    assert "".join(event.text for event in chat.of(ev.TextDelta)) == outcome.reply
    turn = chat.conversation.log.turns[-1]
    fed = chat.conversation.log.ids[turn.message_start : turn.end]
    assert f"{text}<|im_end|>" in chat.tokenizer.decode(fed)  # what is fed does not depend on what is shown
    return outcome.reply


# --- opened by the prompt ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("Well.\n</think>\n\nGood day.", ("Well.", "Good day.")),
        ("\nWell.</think>Good day.", ("Well.", "Good day.")),
        ("<think>\nWell.\n</think>\n\nGood day.", ("Well.", "Good day.")),  # the tag once more
        ("</think>\n\nGood day.", ("", "Good day.")),
        ("Never closed", ("Never closed", "")),
        ("Well.\n</think>\n\nNow <think> opens, </think> closes.", ("Well.", "Now <think> opens, </think> closes.")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("added", [(), ("<think>", "</think>")])
@pytest.mark.parametrize("key", ["", "reasoning_content"])
def test_the_prompt_opens_the_reasoning(written: str, shown: tuple[str, str], added: tuple[str, ...], key: str) -> None:
    opening = "<think>\n" if key else ""
    chat = make_chat(template=template(opening, "\n</think>\n\n", prompt="<think>\n"), added=added)
    assert split(reply(chat, written)) == shown


def test_a_block_that_the_prompt_opens_and_closes_leaves_the_answer() -> None:
    chat = make_chat(template=THINKING)
    assert reply(chat, "Good day.") == "Good day."


def test_a_reply_in_an_open_block_is_saved_with_its_tags() -> None:
    chat = make_chat(template=template(prompt="<think>\n"))
    assert reply(chat, "Well.\n</think>\n\nGood day.") == "<think>\nWell.\n</think>\n\nGood day."
    assert chat.conversation.log.turns[-1].reply == "<think>\nWell.\n</think>\n\nGood day."


# --- tags and special tokens ------------------------------------------------------------------------------------

TAGS = [
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<unheard:of>", "</unheard:of>"),
]


@pytest.mark.slow
@pytest.mark.parametrize("tags", TAGS)
@pytest.mark.parametrize("kind", ["special", "added", "text"])
@pytest.mark.parametrize("opened", [False, True])
def test_what_the_template_writes_around_reasoning_is_recognized(
    tags: tuple[str, str], kind: str, opened: bool
) -> None:
    tokens: dict[str, Any] = {"special": {"control": tags}, "added": {"added": tags}, "text": {}}[kind]
    prompt = tags[0] if opened else ""
    chat = make_chat(template=template(*tags, prompt=prompt), **tokens)
    before = "" if opened else tags[0]
    assert split(reply(chat, f"{before}Well, a < b.{tags[1]}Good day.")) == ("Well, a < b.", "Good day.")


@pytest.mark.parametrize("key", ["thinking", "reasoning"])
def test_templates_look_for_reasoning_under_several_names(key: str) -> None:
    tags = TAGS[-1]
    chat = make_chat(template=template(*tags, key=key), control=tags)
    assert split(reply(chat, f"{tags[0]}Well.{tags[1]}Good day.")) == ("Well.", "Good day.")


@pytest.mark.parametrize("tags", TAGS[:-1])
@pytest.mark.parametrize("kind", ["control", "added"])
def test_known_tags_of_a_vocabulary_are_recognized(tags: tuple[str, str], kind: str) -> None:
    vocabulary: dict[str, Any] = {kind: tags}
    chat = make_chat(template=CHATML, **vocabulary)
    assert split(reply(chat, f"{tags[0]}Well.{tags[1]}\n\nGood day.")) == ("Well.", "Good day.")


def test_a_named_channel_in_special_tokens() -> None:
    chat = make_chat(template=CHATML, control=("<|channel>", "<channel|>"))
    assert split(reply(chat, "<|channel>thought\nWell.<channel|>Good day.")) == ("Well.", "Good day.")


def test_special_tokens_are_recognized_anywhere() -> None:
    chat = make_chat(template=CHATML, control=("<think>", "</think>"))
    assert split(reply(chat, "<think>One.</think><think>Two.</think>Good <think>three</think>day.")) == (
        "One.\n\nTwo.",
        "Good day.",
    )


def test_tags_that_the_model_does_not_have_are_text() -> None:
    chat = make_chat(template=CHATML)
    for text in ("[THINK]Well.[/THINK]", "<seed:think>Well.", "Say <think>this</think> aloud.", "<thinking>Well."):
        chat.events.clear()
        assert reply(chat, text) == text


def test_reasoning_of_special_tokens_alone() -> None:
    chat = make_chat(template=CHATML, control=("[THINK]", "[/THINK]"))
    assert split(reply(chat, "[THINK]Well.[/THINK]")) == ("Well.", "")
    chat.events.clear()
    assert split(reply(chat, "[THINK]Wel")) == ("Wel", "")
    chat.events.clear()
    assert reply(chat, "[THINK]\n[/THINK]Good day.") == "Good day."


def test_marks_of_the_template_have_no_text() -> None:
    """Also where the tokenizer does not call them special, and so decodes them."""
    around = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}<answer>{% endif %}"
        "{{ m['content'] }}{% if m['role'] == 'assistant' %}</answer>{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = make_chat(template=around, added=("<answer>", "</answer>"))
    assert chat.say("Hello", "<answer>Good day.</answer>").reply == "Good day."


def test_replies_without_a_template_are_text() -> None:
    chat = make_chat(template=None)
    for text in ("Good day.", "A <think> b", "<think>Well.</think>Good day."):
        assert chat.say("Hello", text).reply == text


def test_a_stopped_turn_that_has_shown_only_marks_is_rolled_back() -> None:
    chat = make_chat(template=template(prompt="<think>\n"), control=("[THINK]", "[/THINK]"))
    ids = chat.tokenizer("\n\nWell.", add_special_tokens=False)["input_ids"]
    left = iter([False, False, True])
    outcome = chat.say("Hello", ids, cancelled=lambda: next(left, True))
    assert outcome.rolled_back
    assert outcome.reply == ""


# --- what is learned --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [CHATML, THINKING, INSIDE])
def test_ordinary_templates_need_no_reader(plain: str) -> None:
    tokenizer = toy_tokenizer(plain)
    shape = learn_shape(tokenizer, ChatEncoder(tokenizer, choose_format(tokenizer, "auto", "")))
    assert learn_reasoning(tokenizer, shape).plain


def test_a_template_that_raises_teaches_nothing() -> None:
    tokenizer = toy_tokenizer(
        "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    )
    shape = learn_shape(tokenizer, ChatEncoder(tokenizer, choose_format(tokenizer, "auto", "")))
    assert shape.inside == frozenset()
    assert shape.messages is None


# --- any stream of tokens ---------------------------------------------------------------------------------------

START, HEADER_END, CLOSE, CHANNEL, OPEN, SHUT, OTHER = range(7)
EVERY = ReasoningFormat(
    tags=(Tags("<think>", "</think>"),),
    opening={OPEN: Tags("[T]", "[/T]")},
    closing=frozenset({SHUT}),
    silent=frozenset({OTHER}),
    messages=Messages(START, "assistant", HEADER_END, CLOSE, CHANNEL, "final"),
)
PIECES = st.one_of(
    st.integers(0, 6),
    st.sampled_from(["assistant", "final", "analysis", "word ", "\n", "<think>", "</th", "ink>", " "]),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=25))
def test_any_tokens_are_read_to_the_same_text_in_one_piece(pieces: list[int | str]) -> None:
    """Whatever comes, a reply that is split again, as a front end does, is split as it was written."""
    reader = ReplyReader(EVERY)
    assert all(reader.is_mark(piece) for piece in pieces if isinstance(piece, int))
    shown = "".join(reader.mark(piece) if isinstance(piece, int) else reader.text(piece) for piece in pieces)
    shown += reader.end()
    thoughts, answer = split(shown)
    again = ReplyReader(ReasoningFormat())
    assert split(again.text(shown) + again.end()) == (thoughts, answer)
    letters = ReplyReader(EVERY)
    by_letter = "".join(
        letters.mark(piece) if isinstance(piece, int) else "".join(map(letters.text, piece)) for piece in pieces
    )
    assert by_letter + letters.end() == shown


def test_an_empty_shape_is_plain() -> None:
    assert learn_reasoning(toy_tokenizer(None), ReplyShape()).plain
