"""What is found to end replies, and each token of a reply of several messages: without a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from streamchat.conversation.ends import Ends, EndWatch, NextMessage, find_ends
from streamchat.conversation.template.reply_shape import Messages, ReplyShape

TEXTS = [
    "<end>",
    "<start>",
    "<close>",
    "assistant",
    "user",
    " ",
    "assist",
    "ant",
    "word",
    " user",
    "er",
    "us",
    "\n",
    "the",
]
END, START, CLOSE, ASSISTANT, USER, SPACE, ASSIST, ANT, WORD, SPACE_USER, ER, US, LINE, THE = range(14)


class Decoder:
    """Decodes the ids of TEXTS."""

    eos_token_id: Any = END

    def decode(self, ids: list[int], *, clean_up_tokenization_spaces: bool = True) -> str:
        """Return the text; spaces at its start are dropped by default, as some tokenizers do."""
        text = "".join(TEXTS[token] for token in ids)
        return text.replace(" user", "user") if clean_up_tokenization_spaces and len(ids) > 1 else text


def watched(message: NextMessage | None, ids: list[int]) -> list[tuple[bool, int]]:
    """For each token up to the end: whether it ends the reply, and how many tokens belong to the reply then."""
    watch, seen = EndWatch(Ends(frozenset({END}), message), Decoder()), list[tuple[bool, int]]()
    for token in ids:
        seen.append((watch.ended_by(token), watch.length))
        if seen[-1][0]:
            break
    return seen


OWN = NextMessage(START, "assistant", True, CLOSE)
FOREIGN = NextMessage(START, "user", False, CLOSE)


@pytest.mark.parametrize(
    ("message", "ids", "lengths"),
    [
        (None, [WORD, START, CLOSE, SPACE], [1, 2, 3, 4]),  # one message: all tokens but the end belong to it
        (OWN, [WORD, SPACE, WORD], [1, 2, 3]),
        (OWN, [SPACE, LINE, WORD], [1, 2, 3]),
        (NextMessage(START, "the user", True, CLOSE), [WORD, START, THE, SPACE_USER, WORD], [1, 1, 1, 1, 5]),
        (OWN, [WORD, CLOSE, SPACE, LINE, WORD, WORD, SPACE], [1, 1, 1, 1, 5, 6, 7]),
        (OWN, [WORD, CLOSE, START, ASSISTANT, WORD, SPACE], [1, 1, 1, 1, 5, 5 + 1]),
        (OWN, [WORD, CLOSE, START, ASSIST, ANT, WORD], [1, 1, 1, 1, 1, 6]),
        (OWN, [WORD, CLOSE, START, SPACE, ASSISTANT, SPACE, WORD], [1, 1, 1, 1, 1, 1, 7]),
        (FOREIGN, [WORD, START, ASSISTANT, WORD], [1, 1, 1, 4]),
        (FOREIGN, [WORD, CLOSE, START, WORD, SPACE, WORD], [1, 1, 1, 1, 1, 6]),
        (FOREIGN, [CLOSE, CLOSE, WORD], [0, 0, 3]),
    ],
)
def test_messages_of_the_model_belong_to_the_reply_when_their_text_starts(
    message: NextMessage | None, ids: list[int], lengths: list[int]
) -> None:
    assert watched(message, ids) == [(False, length) for length in lengths]
    ended = watched(message, [*ids, END])
    assert ended[-1] == (True, lengths[-1])


@pytest.mark.parametrize(
    ("message", "ids", "length"),
    [
        (OWN, [WORD, CLOSE, START, USER], 1),
        (OWN, [WORD, START, SPACE_USER], 1),
        (OWN, [WORD, WORD, CLOSE, SPACE, START, ASSIST, WORD], 2),
        (FOREIGN, [WORD, START, USER], 1),
        (FOREIGN, [WORD, WORD, START, SPACE, SPACE, US, ER], 2),
        (FOREIGN, [WORD, CLOSE, START, SPACE, USER], 1),
    ],
)
def test_a_message_of_another_role_ends_the_reply_when_its_role_is_certain(
    message: NextMessage, ids: list[int], length: int
) -> None:
    seen = watched(message, ids)
    assert [ended for ended, _ in seen] == [*[False] * (len(ids) - 1), True]
    assert seen[-1][1] == length


def model(listed: Any, own: Any) -> Any:
    """A model whose generation settings and text configuration list these end tokens."""
    text = SimpleNamespace() if own == "none" else SimpleNamespace(eos_token_id=own)
    return SimpleNamespace(
        generation_config=SimpleNamespace(eos_token_id=listed), config=SimpleNamespace(get_text_config=lambda: text)
    )


def tokenizer(eos: int | None = None) -> Any:
    return SimpleNamespace(eos_token_id=eos)


@pytest.mark.parametrize(
    ("listed", "own", "eos", "expected"),
    [
        ([1, 2], None, None, {1, 2}),
        ((1, 2), 3, 4, {1, 2, 3, 4}),
        (None, [5], 0, {0, 5}),
        (0, "none", None, {0}),
        (None, None, None, set()),
    ],
)
def test_every_place_that_lists_end_tokens_counts(listed: Any, own: Any, eos: int | None, expected: set[int]) -> None:
    assert find_ends(model(listed, own), tokenizer(eos), ReplyShape()) == Ends(frozenset(expected), None)


CHANNELS = Messages(START, "assistant", 20, CLOSE, 21, "final")


@pytest.mark.parametrize(
    ("listed", "shape", "expected"),
    [
        # the marks of a template end a reply, unless it writes them inside one
        ([1], ReplyShape(close=7, user=8), Ends(frozenset({1, 7, 8}))),
        ([1], ReplyShape(close=7, user=8, user_role="user"), Ends(frozenset({1, 7, 8}))),
        ([1], ReplyShape(close=7, user=8, inside=frozenset({7})), Ends(frozenset({1, 8}))),
        (
            [1, 7],
            ReplyShape(close=7, user=8, user_role="user", inside=frozenset({7, 8})),
            Ends(frozenset({1}), NextMessage(8, "user", False, 7)),
        ),
        (
            [1],
            ReplyShape(close=7, user=8, user_role="user", inside=frozenset({8})),
            Ends(frozenset({1, 7}), NextMessage(8, "user", False, None)),
        ),
        ([1], ReplyShape(close=7, user=8, inside=frozenset({8})), Ends(frozenset({1, 7}))),
        # a list that has only marks inside a reply is taken as it is
        ([7], ReplyShape(close=7, inside=frozenset({7})), Ends(frozenset({7}))),
        # of several messages, neither closing nor opening one ends the reply
        (
            [5, 7],
            ReplyShape(close=7, user=START, inside=frozenset({9}), messages=CHANNELS),
            Ends(frozenset({5}), NextMessage(START, "assistant", True, 7)),
        ),
    ],
)
def test_ends_by_the_shape_of_replies(listed: list[int], shape: ReplyShape, expected: Ends) -> None:
    assert find_ends(model(listed, None), tokenizer(), shape) == expected
