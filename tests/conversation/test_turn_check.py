"""How a fed turn is compared with the template: ids are characters here, or 100,000 more for letters.

`§` opens a message and `¶` closes it; both are control tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from streamchat.conversation.template.chat_format import ChatFormat, Fallback
from streamchat.conversation.template.reference import Exchange, Reference
from streamchat.conversation.template.turn_check import FedTurn, turn_difference

pytestmark = pytest.mark.smoke

CONTROL = {ord("§"), ord("¶")}
LETTERS = 100_000
JOINED = "♦"
"""`z¶` as one id."""
FORMAT = ChatFormat("template", "", "", "", "§u", "§u", "¶§a", "¶", "¶§a")
BEFORE: tuple[Exchange, ...] = (("one", "two"),)
START = "§uone¶§atwo¶"


class Characters:
    """A tokenizer whose ids are code points."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(char) for char in text.replace("z¶", JOINED)]}

    def decode(self, ids: Sequence[int], clean_up_tokenization_spaces: bool = True) -> str:
        text = "".join(chr(token % LETTERS) for token in ids).replace(JOINED, "z¶")
        return text.replace(" .", ".") if clean_up_tokenization_spaces else text

    def get_chat_template(self) -> str:
        return "written below"

    def apply_chat_template(self, messages: Any, tokenize: bool, add_generation_prompt: bool) -> str:
        written = "".join(f"§{each['role'][0]}{each['content']}¶" for each in messages)
        return f"{written}§a" if add_generation_prompt else written


def ids(text: str) -> list[int]:
    """Ids in which what is inside braces is letters."""
    pieces = text.replace("}", "{").split("{")
    return [ord(char) + LETTERS * (i % 2) for i, piece in enumerate(pieces) for char in piece]


def difference(
    fed: str,
    message: str,
    history: Sequence[Exchange] = (),
    *,
    reply: str = "reply",
    after: str = "",
    given: bool = False,
    fallbacks: tuple[Fallback, ...] = (),
) -> str:
    """The difference of a turn that is fed so; `after` is fed after the start of the reply."""
    tokenizer, prompt = Characters(), ids(fed)
    turn = FedTurn(history, message, reply, prompt + ids(after), len(prompt), given)
    return turn_difference(Reference(tokenizer, replace(FORMAT, fallbacks=fallbacks), ""), tokenizer, CONTROL, turn)


def test_a_turn_that_is_fed_as_the_template_writes_it() -> None:
    assert difference("§uHi¶§a", "Hi", after="reply") == ""
    assert difference(f"{START}§uHi¶§a", "Hi", BEFORE, after="reply") == ""
    assert difference("§uHi¶§", "Hi") != ""
    assert difference("§u{Hi}¶§a", "Hi") != ""  # other ids of the same text
    assert difference("§uHi¶§{a}", "Hi") != ""


def test_the_first_turn_is_compared_as_a_whole() -> None:
    assert difference("x§uHi¶§a", "Hi") != ""
    assert difference("{§}uHi¶§a", "Hi") != ""
    assert difference(f"x{START}§uHi¶§a", "Hi", BEFORE) == ""


@pytest.mark.parametrize("fallback", ["clock", "start-kept"])
def test_a_start_that_the_template_would_write_otherwise_now_is_not_compared(fallback: Fallback) -> None:
    assert difference("[12:30] §uHi¶§a", "Hi", fallbacks=(fallback,)) == ""
    assert difference("[12:30] §uHo¶§a", "Hi", fallbacks=(fallback,)) != ""


def test_what_is_between_the_previous_reply_and_the_message_is_compared() -> None:
    assert difference("§uone¶§atwo§uHi¶§a", "Hi", BEFORE) != ""
    assert difference("§uone¶§atwo¶uHi¶§a", "Hi", BEFORE) != ""
    assert difference("§uone¶§axyz¶§uHi¶§a", "Hi", BEFORE) == ""  # that reply was compared with its own turn


def test_the_end_of_the_previous_reply_may_have_grown_together_with_its_close() -> None:
    assert difference(f"§uxyz¶§afe{JOINED}§uHi¶§a", "Hi", [("one", "fez")]) == ""
    for reply in ("fez", "lake"):
        assert difference("§uxyz¶§afez¶§uHi¶§a", "Hi", [("one", reply)]) == ""
    assert difference(f"§uxyz¶§afe{JOINED}§uHi¶§a", "Hi", [("one", "lake")]) != ""


DIGITS = "0123456789" * 15


def test_a_difference_is_shown_with_20_characters_before_it() -> None:
    fed = f"§u{DIGITS[:50]}x{DIGITS[51:]}¶§a"
    wanted, actual = f"{DIGITS[30:110]!r}", f"{DIGITS[30:50]}x{DIGITS[51:110]}"
    assert difference(fed, DIGITS) == f"the chat template writes {wanted}, and {actual!r} was fed"
    assert difference(f"§ux{DIGITS[1:]}¶§a", DIGITS) == (
        f"the chat template writes '§u{DIGITS[:78]}', and '§ux{DIGITS[1:78]}' was fed"
    )


def test_a_difference_of_a_later_turn_is_shown_without_the_turn_before() -> None:
    assert difference(f"{START}§uHo¶§a", "Hi", BEFORE) == "the chat template writes '¶§uHi¶§a', and '¶§uHo¶§a' was fed"


# --- given replies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "is_fed"),
    [
        *[("reply", True), ("reply¶", True), ("reply¶§ualpha¶§", True), ("reply¶§ualpha¶§a", False)],
        *[("repl", False), ("Reply", False), ("", False), ("reply§", False)],
    ],
)
@pytest.mark.parametrize("history", [(), BEFORE])
def test_a_given_reply_is_compared_up_to_some_part_of_its_close(
    after: str, is_fed: bool, history: tuple[Exchange, ...]
) -> None:
    start = START if history else ""
    assert (difference(f"{start}§uHi¶§a", "Hi", history, after=after, given=True) == "") is is_fed


def test_of_a_turn_that_the_template_rewrites_later_only_the_prompt_is_compared() -> None:
    for given in (False, True):
        assert difference("§uHi¶§a", "Hi", after="other", given=given, fallbacks=("newest-turn",)) == ""
        assert difference("§uHo¶§a", "Hi", after="other", given=given, fallbacks=("newest-turn",)) != ""


# --- names of control tokens in texts ----------------------------------------------------------------------------

NAMED = "its message became control tokens"


@pytest.mark.parametrize(("start", "history"), [("", ()), (START, BEFORE)])
def test_a_name_in_a_message_is_fed_as_letters(start: str, history: tuple[Exchange, ...]) -> None:
    assert difference(f"{start}§ua{{§}}b¶§a", "a§b", history) == ""
    assert difference(f"{start}§ua§b¶§a", "a§b", history) == NAMED
    assert difference(f"{start}§ua§c¶§a", "a§b", history).startswith("the chat template writes")
    assert difference(f"{start}§ua{{§}} .¶§a", "a§.", history) != ""
    assert difference(f"{start}§ua{{§}}¶§a", "a§", history, after="reply", given=True) == ""
    assert difference(f"{start}§ua§¶§a", "a§", history, after="reply", given=True) == NAMED
    assert difference(f"{start}§ua{{§}}¶§a", "a§", history, after="repl", given=True) != ""


def test_a_given_reply_may_have_control_tokens() -> None:
    for after in ("r§", "r{§}"):
        assert difference("§uHi¶§a", "Hi", reply="r§", after=after, given=True) == ""
        assert difference("§uHi¶§a", "Hi", reply="r§", after=after.replace("r", "R"), given=True) != ""
    assert difference("§u{Hi}¶§a", "Hi", reply="r§", given=False) != ""
