"""Text streamed id by id: whole characters, at once, equal to decoding everything together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamchat.conversation.detokenizer import REPLACEMENT, Detokenizer
from tests.support.toy_tokenizer import VOCABULARY, WORDS, byte_token_tokenizer, toy_tokenizer

TEXTS = [
    "plain words, and more words",
    "family 👨‍👩‍👧‍👦 flag 🇩🇪 skin 👍🏽",
    "Привет, мир",
    "안녕하세요 세계",
    "  leading and   inner spaces\n\n\ttabs",
    "a real \N{REPLACEMENT CHARACTER} inside, and at the end \N{REPLACEMENT CHARACTER}",
    "x" * 400,
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_join_to_the_text(text: str) -> None:
    tokenizer = toy_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in ids]
    tail = detokenizer.flush()
    assert "".join(pieces) + tail == text
    assert "".join(pieces).count(REPLACEMENT) <= text.count(REPLACEMENT)


def test_text_without_spaces_is_not_held_back() -> None:
    tokenizer = toy_tokenizer()
    ids = tokenizer("q" * 200, add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(tokenizer)
    assert all(detokenizer.push(token) for token in ids)


@pytest.mark.fuzz
@given(st.lists(st.integers(0, VOCABULARY - 1), max_size=60))
def test_any_ids_join_to_the_one_shot_decoding(ids: list[int]) -> None:
    tokenizer = _SHARED
    ids = [token for token in ids if token < len(tokenizer)]
    detokenizer = Detokenizer(tokenizer)
    streamed = "".join(detokenizer.push(token) for token in ids) + detokenizer.flush()
    assert streamed == tokenizer.decode(ids, skip_special_tokens=True)


_SHARED = toy_tokenizer()
_WITH_BYTES = byte_token_tokenizer()
FIRST_BYTE, FIRST_WORD = 3, 259


@pytest.mark.parametrize("text", TEXTS)
def test_characters_of_byte_tokens_are_shown_whole_and_at_once(text: str) -> None:
    """As Llama 2, Mistral and Gemma write what they have no token for."""
    ids = [FIRST_WORD + WORDS.index("hello"), *(FIRST_BYTE + byte for byte in text.encode())]
    detokenizer = Detokenizer(_WITH_BYTES)
    pieces = [detokenizer.push(token) for token in ids]
    assert detokenizer.flush() == ""
    assert "".join(pieces) == "hello" + text == _WITH_BYTES.decode(ids)
    shown = 0
    for piece, byte in zip(pieces[1:], text.encode(), strict=True):
        shown += len(piece.encode())
        assert len(piece) <= 1  # each character with its last byte
        assert piece or byte >= 0x80
    assert shown == len(text.encode())


@pytest.mark.fuzz
@given(st.lists(st.integers(0, FIRST_WORD + len(WORDS) - 1), max_size=60))
def test_any_ids_of_a_tokenizer_with_byte_tokens(ids: list[int]) -> None:
    """Rows of bytes that are no text lose only what is broken of them."""
    expected = "".join(row.decode("utf-8", "replace") for row in _rows(ids)).removeprefix(" ")
    detokenizer = Detokenizer(_WITH_BYTES)
    streamed = "".join(detokenizer.push(token) for token in ids) + detokenizer.flush()
    assert streamed == expected
    if REPLACEMENT not in streamed:
        assert streamed == _WITH_BYTES.decode(ids, skip_special_tokens=True)


def _rows(ids: list[int]) -> list[bytes]:
    """Words and rows of bytes, each by itself, as bytes."""
    rows: list[bytes] = []
    in_row = False
    for token in ids:
        is_byte = FIRST_BYTE <= token < FIRST_WORD
        if is_byte and in_row:
            rows[-1] += bytes([token - FIRST_BYTE])
        elif is_byte:
            rows.append(bytes([token - FIRST_BYTE]))
        else:
            rows.append(WORDS[token - FIRST_WORD].replace("▁", " ").encode() if token >= FIRST_WORD else b"")
        in_row = is_byte
    return rows
