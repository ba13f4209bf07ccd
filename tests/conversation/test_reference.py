"""The reference of a format: whole conversations as the template writes them, and the parts of ids that turns share."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from streamchat.conversation.template.chat_format import Fallback
from streamchat.conversation.template.contents import Contents
from streamchat.conversation.template.format import choose_format
from streamchat.conversation.template.reference import Reference, common_end, common_start
from streamchat.conversation.template.turn_check import _same_text
from tests.support import toy_tokenizer as toy

ONE, TWO = ("m1", "r1"), ("m2", "r2")


def reference(template: str | None, system: str = "", *fallbacks: Fallback) -> Reference:
    tokenizer = toy.toy_tokenizer(template)
    chosen = choose_format(tokenizer, "auto", system)
    return Reference(tokenizer, replace(chosen, fallbacks=fallbacks or chosen.fallbacks), system)


def ids_of(text: str) -> list[int]:
    found: list[int] = toy.toy_tokenizer()(text, add_special_tokens=False)["input_ids"]
    return found


@pytest.mark.parametrize(
    ("first", "second", "start", "end"),
    [
        ([], [1], 0, 0),
        ([1, 2, 3], [1, 2, 3], 3, 3),
        ([1, 2, 3], [1, 2], 2, 0),
        ([1, 2, 3], [1, 5, 3], 1, 1),
        ([2, 3], [1, 2, 3], 0, 2),
        ([1], [2], 0, 0),
    ],
)
def test_common_start_and_end(first: list[int], second: list[int], start: int, end: int) -> None:
    assert (common_start(first, second), common_end(first, second)) == (start, end)


def test_a_conversation_in_a_template() -> None:
    made = reference(toy.CHATML, "Be brief.")
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    asked = "<|im_start|>user\nm1<|im_end|>\n<|im_start|>assistant\n"
    assert made.text([], "m1") == system + asked
    assert made.text([], "m1", with_system=False) == f"<|im_start|>system\nBe kind.<|im_end|>\n{asked}"
    assert made.text([ONE], "m2") == f"{system}{asked}r1<|im_end|>\n{asked.replace('m1', 'm2')}"
    assert made.ids([], "m1") == ids_of(system + asked)


@pytest.mark.parametrize(
    ("system", "start"), [("", ""), ("Be brief.", "Be brief.\n\n"), (" Be brief.\n", "Be brief.\n\n"), ("  ", "")]
)
def test_a_conversation_in_the_plain_format(system: str, start: str) -> None:
    made = reference(None, system)
    start = made.format.system_open + start
    assert made.text([], " m1 ") == f"{start}User: m1\nAssistant:"
    history = [(" m1 ", " r1\n")]
    assert made.text(history, "m2") == f"{start}User: m1\nAssistant: r1\nUser: m2\nAssistant:"


def test_a_folded_system_prompt_is_written_before_the_first_message() -> None:
    made = reference(toy.NO_SYSTEM, "Be brief.")
    assert made.fallbacks == ("system-folded",)
    user, reply = "<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n"
    first = user.format("Be brief.\n\nm1") + reply
    assert made.text([], "m1") == first
    assert made.text([ONE], "m2") == f"{first}r1<|im_end|>\n{user.format('m2')}{reply}"
    assert made.text([], "m1", with_system=False) == user.format("m1") + reply
    assert reference(toy.NO_SYSTEM, "", "system-folded").text([], "m1") == user.format("m1") + reply


def test_a_system_prompt_that_the_template_moves_is_in_the_first_turn_only() -> None:
    made = reference(toy.LAST_SYSTEM, "Be brief.")
    assert made.fallbacks == ("system-first",)
    assert made.text([], "m1") == "<|im_start|>[INST] Be brief.\n\nm1[/INST]"
    assert made.text([ONE], "m2") == "<|im_start|>[INST] m1[/INST] r1<|im_end|>[INST] m2[/INST]"
    ids, _ = made.replied([], "m1", "r1")
    whole = toy.toy_tokenizer().decode(ids)
    assert whole == "<|im_start|>[INST] Be brief.\n\nm1[/INST] r1<|im_end|>[INST] alpha[/INST]"
    ids, _ = made.replied([ONE], "m2", "r2")
    assert "Be brief" not in toy.toy_tokenizer().decode(ids)
    ids, _ = reference(toy.LAST_SYSTEM, "", "system-first").replied([], "m1", "r1")
    assert toy.toy_tokenizer().decode(ids) == "<|im_start|>[INST] m1[/INST] r1<|im_end|>[INST] alpha[/INST]"


def test_a_reply_that_was_given_is_followed_by_another_message() -> None:
    made = reference(toy.CHATML)
    ids, tail = made.replied([ONE], "m2", "r2")
    between = "<|im_end|>\n<|im_start|>user\nalpha<|im_end|>\n<|im_start|>assistant\n"
    assert toy.toy_tokenizer().decode(ids).endswith(f"m2<|im_end|>\n<|im_start|>assistant\nr2{between}")
    assert tail == len(ids_of(between))


def test_the_ids_between_a_reply_and_the_next_message() -> None:
    assert reference(toy.CHATML).between == ids_of("<|im_end|>\n<|im_start|>user\n")
    assert reference(toy.NEWEST).between == ids_of("<|im_end|>\n<|im_start|>user (new)\n")


def test_the_ids_behind_the_opening_of_a_message() -> None:
    made = reference(toy.CHATML)
    ids = made.ids([ONE], "word")
    assert toy.toy_tokenizer().decode(made.behind_opening([ONE], ids)) == "word<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("count", "window", "newest"),
    [(0, [], []), (1, [1], [1]), (2, [1, 2], [1]), (3, [1, 3], [1]), (4, [1, 4], [1])],
)
def test_the_turns_that_the_newest_one_depends_on(count: int, window: list[int], newest: list[int]) -> None:
    history = [(f"m{number}", f"r{number}") for number in range(1, count + 1)]
    assert reference(toy.CHATML).window(history) == [history[number - 1] for number in window]
    assert reference(toy.NEWEST).window(history) == [history[number - 1] for number in newest]


def test_a_name_may_take_16_times_as_many_ids_in_single_letters() -> None:
    words = {1: "abcdefgh", 2: "ijklmnop"}
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "".join(words.get(token) or chr(token) for token in ids))
    letters = [ord(letter) for letter in "xabcdefghijklmnop"]
    assert _same_text(tokenizer, letters, [1, 2])
    assert not _same_text(tokenizer, letters[:-1], [1, 2])
    words[3] = words[1] + words[2]
    assert _same_text(tokenizer, letters, [3])


def frame(written: str) -> Any:
    return SimpleNamespace(
        content=lambda render, text: None if written is None else f"{render} {written} {text}".strip()
    )


def test_first_and_later_messages_and_replies_have_frames_of_their_own() -> None:
    contents = Contents("r", frame("first"), frame("later"), frame("reply"))  # type: ignore[arg-type]
    assert (contents.message("m", True), contents.message("m", False)) == ("r first m", "r later m")
    assert contents.given("m") == "r reply m"


@pytest.mark.parametrize(("text", "written", "message"), [("m", " ", None), (" ", " ", " "), ("m", None, None)])
def test_a_message_that_would_be_empty_is_unknown(text: str, written: str | None, message: str | None) -> None:
    one: Any = SimpleNamespace(content=lambda render, text: written)
    assert Contents("r", one, one, one).message(text, True) == message  # type: ignore[arg-type]
