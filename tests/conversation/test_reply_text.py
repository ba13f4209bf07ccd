"""A reply as its ids arrive: what is shown, what was written, and which ids stay. Without a model."""

from __future__ import annotations

import pytest

from streamchat.base.thinking import THINK, Tags
from streamchat.conversation.ends import Ends, NextMessage
from streamchat.conversation.reasoning import ReasoningFormat
from streamchat.conversation.reply import KeptReply, ReplyFormat, ReplyText
from streamchat.conversation.template.reply_shape import Messages
from tests.support.toy_tokenizer import toy_tokenizer

TOKENIZER = toy_tokenizer()
TOKENIZER.add_tokens(["[T]", "[/T]", "<open>", "<shut>", "<channel>"], special_tokens=True)
END, START, CLOSE, OPEN, SHUT, CHANNEL = TOKENIZER.convert_tokens_to_ids(
    ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<open>", "<shut>", "<channel>"]
)
ENDS = Ends(frozenset({END}))


def ids(text: str) -> list[int]:
    """One id per letter, unless the letters are a word of the toy tokenizer."""
    found: list[int] = TOKENIZER.encode(text, add_special_tokens=False)
    return found


def reply(*stops: str, ends: Ends = ENDS, **reasoning: object) -> ReplyText:
    return ReplyText(TOKENIZER, stops, ReplyFormat(ends, ReasoningFormat(**reasoning)))  # type: ignore[arg-type]


def pushed(text: ReplyText, tokens: list[int]) -> list[str]:
    """What each id shows, and what the end shows."""
    pieces = []
    for token in tokens:
        assert not text.ended_by(token)
        pieces.append(text.push(token))
    return [*pieces, text.finish()]


def test_white_space_at_the_start_is_not_shown_and_its_ids_stay() -> None:
    text = reply()
    pieces = pushed(text, ids("\n z z"))
    assert (pieces[0], "".join(pieces)) == ("", "z z")
    assert (text.shown, text.written, text.stopped) == ("z z", "\n z z", False)
    assert text.kept() == KeptReply(len(ids("\n z z")), "")
    assert text.ended_by(END)
    assert not text.ended_by(CLOSE)


def test_text_that_may_start_a_stop_string_is_held_back() -> None:
    text = reply("zqq", "j")
    assert pushed(text, ids("kzqkzq")) == ["k", "", "", "zqk", "", "", "zq"]
    assert (text.shown, text.written, text.kept()) == ("kzqkzq", "kzqkzq", KeptReply(6, ""))
    text = reply("zqq", "j")
    assert pushed(text, ids("kzkzqq")) == ["k", "", "zk", "", "", "", ""]
    assert text.stopped
    assert (text.shown, text.written, text.kept()) == ("kzk", "kzk", KeptReply(3, ""))


def test_a_stop_string_inside_a_token_leaves_the_text_before_it_without_the_token() -> None:
    word = ids(" capital")
    assert len(word) == 1
    text = reply("pit")
    assert pushed(text, [*ids("zz"), *word]) == ["z", "z", " ca", ""]
    assert text.kept() == KeptReply(2, " ca")
    text = reply("pit")
    assert pushed(text, word) == ["ca", ""]
    assert (text.written, text.kept()) == (" ca", KeptReply(0, " ca"))


def test_an_unfinished_character_does_not_stay() -> None:
    text, tokens = reply(), ids("z🙂")
    assert len(tokens) == 5
    assert pushed(text, tokens[:4]) == ["z", "", "", "", ""]
    assert (text.written, text.kept()) == ("z", KeptReply(1, ""))
    assert reply().read(tokens).kept() == KeptReply(5, "")
    assert reply().read([]).kept() == KeptReply(0, "")


def test_control_tokens_of_a_format_have_no_text_and_stay() -> None:
    silent = reply(silent=frozenset({OPEN}))
    brackets = TOKENIZER.convert_tokens_to_ids(["[T]", "[/T]"])
    assert pushed(silent, [OPEN, *ids("z"), OPEN]) == ["", "z", "", ""]
    assert silent.kept() == KeptReply(3, "")
    tags = (Tags("[T]", "[/T]"), THINK)
    text = reply(tags=tags, opening={brackets[0]: tags[0]}, closing=frozenset({brackets[1]}))
    assert pushed(text, [brackets[0], *ids("z"), brackets[1], *ids("k")]) == [
        "",
        "<think>\nz",
        "",
        "\n</think>\n\nk",
        "",
    ]
    assert (text.shown, text.written) == ("<think>\nz\n</think>\n\nk", "zk")
    assert text.kept() == KeptReply(4, "")
    text = reply(tags=tags, opening={brackets[0]: tags[0]}, closing=frozenset({brackets[1]}))
    assert pushed(text, [brackets[0], *ids("z"), brackets[1]]) == ["", "<think>\nz", "", "\n</think>"]


MESSAGES = Messages(START, "user", SHUT, CLOSE, CHANNEL, "final")
SEVERAL = Ends(frozenset({END}), NextMessage(START, "user", True, CLOSE))


@pytest.mark.parametrize(
    ("tokens", "written", "shown", "kept"),
    [
        ([CHANNEL, *ids("f"), SHUT, *ids("z")], "fz", "<think>\nz", 4),
        ([SHUT, *ids("z"), CLOSE], "z", "z", 2),
        ([SHUT, *ids("z"), CLOSE, *ids(" "), START], "z", "z", 2),
        ([SHUT, *ids("z"), CLOSE, START, *ids("u")], "z", "z", 2),
        ([SHUT, *ids("z"), CLOSE, START, *ids("user"), SHUT, *ids("k")], "zuserk", "zk", 5 + len(ids("user")) + 1),
        ([CLOSE, START, *ids("u")], "", "", 0),
    ],
)
def test_ids_behind_the_last_message_do_not_stay(tokens: list[int], written: str, shown: str, kept: int) -> None:
    text = reply(ends=SEVERAL, messages=MESSAGES).read(tokens)
    assert (text.written, text.shown, text.kept()) == (written, shown, KeptReply(kept, ""))


def test_of_a_message_of_another_role_nothing_stays() -> None:
    text = reply(ends=SEVERAL, messages=MESSAGES)
    tokens = [SHUT, *ids("z"), CLOSE, START, *ids("x")]
    assert [text.ended_by(token) or (text.push(token) and False) for token in tokens][-1]
    text.finish()
    assert (text.shown, text.kept()) == ("z", KeptReply(2, ""))
