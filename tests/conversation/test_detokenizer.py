"""Text streamed id by id: whole characters, at once, equal to decoding everything together."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from streamchat.conversation.detokenizer import REPLACEMENT, Detokenizer
from tests.support.toy_tokenizer import VOCABULARY, WORDS, byte_token_tokenizer, joining_tokenizer, toy_tokenizer

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


# --- exact pieces -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_byte_tokens", [False, True])
def test_a_character_is_complete_with_its_last_byte_or_at_the_end(has_byte_tokens: bool) -> None:
    tokenizer, ids = _SHARED, _SHARED("aé🙂b", add_special_tokens=False)["input_ids"]
    if has_byte_tokens:
        tokenizer, ids = _WITH_BYTES, [FIRST_WORD + WORDS.index("a"), *(FIRST_BYTE + byte for byte in "é🙂b".encode())]
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.complete
    held = ("", False)
    expected = [("a", True), held, ("é", True), held, held, held, ("🙂", True), ("b", True), held]
    assert [(detokenizer.push(token), detokenizer.complete) for token in [*ids, ids[1]]] == expected
    assert (detokenizer.flush(), detokenizer.complete) == (REPLACEMENT, True)
    assert detokenizer.flush() == ""


def test_a_token_of_a_letter_and_half_a_character_shows_the_letter_at_once() -> None:
    """The bytes of é are 0xC3 and 0xA9, which a byte-level vocabulary writes as Ã and ©."""
    backend = Tokenizer(models.BPE(vocab={"b": 0, "aÃ": 1, "©": 2}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    detokenizer = Detokenizer(fast_tokenizer(backend))
    assert [detokenizer.push(token) for token in (0, 1, 2, 1, 0)] == ["b", "a", "é", "a", f"{REPLACEMENT}b"]


def test_a_word_after_a_first_character_of_bytes_has_its_space() -> None:
    ids = [*(FIRST_BYTE + byte for byte in "€".encode()), FIRST_WORD + WORDS.index("▁hello")]
    detokenizer = Detokenizer(_WITH_BYTES)
    assert [detokenizer.push(token) for token in ids] == ["", "", "€", " hello"]


def test_spaces_before_signs_are_shown_also_if_the_tokenizer_would_drop_them() -> None:
    tokenizer = joining_tokenizer()
    ids = tokenizer("he is n't , here .", add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(tokenizer)
    assert "".join(detokenizer.push(token) for token in ids) == "he is n't , here ."


def test_text_that_the_tokenizer_changes_later_is_not_shown_twice() -> None:
    """Without some byte tokens, the library itself decodes the bytes, and shows them one by one until all are there."""
    backend = Tokenizer(models.BPE(vocab={"<0x00>": 0, "<0xE2>": 1, "<0x82>": 2, "<0xAC>": 3}, merges=[]))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    detokenizer = Detokenizer(fast_tokenizer(backend))
    assert [detokenizer.push(token) for token in (1, 2, 3)] == ["", REPLACEMENT, ""]
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("missing", ["one", "two", "all but the first", "decoder"])
def test_names_of_bytes_are_text_if_the_tokenizer_does_not_decode_all_of_them(missing: str) -> None:
    names = [f"<0x{value:02X}>" for value in range(256)]
    del names[{"one": 255, "two": 254, "all but the first": 1, "decoder": 256}[missing] :]
    for unknown in ("<unk>", None):
        vocabulary = {name: i for i, name in enumerate([*names, *["<unk>"] * (unknown is not None)])}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=unknown))
        backend.decoder = decoders.Fuse() if missing == "decoder" else decoders.ByteFallback()
        tokenizer = fast_tokenizer(backend, unk_token=unknown)
        detokenizer, ids = Detokenizer(tokenizer), [0] if len(names) == 1 else [*map(names.index, ("<0xC3>", "<0xA9>"))]
        text = "".join(detokenizer.push(token) for token in ids) + detokenizer.flush()
        assert text == tokenizer.decode(ids)


def fast_tokenizer(backend: Tokenizer, **more: Any) -> Any:
    """A tokenizer of transformers around one of the library tokenizers."""
    return PreTrainedTokenizerFast(tokenizer_object=backend, **more)  # type: ignore[no-untyped-call]
