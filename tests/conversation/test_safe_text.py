"""Text with spans in which names of control tokens are letters, against a plain reference on a plain tokenizer."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import Any

import pytest

from streamchat.conversation.safe_text import SafeText
from tests.support.greedy_tokenizer import GreedyTokenizer

CONTROL = ("<x>", "<x>y", "##", "$")
PLAIN = (*"<x>yab#. \n1)", "ab", "abb", "xb", "by", "<0x24>")
Named = list[tuple[str, int, int]]


def safe(names: Sequence[str] = (*PLAIN, *CONTROL), control: Collection[str] = CONTROL, **more: Any) -> SafeText:
    tokenizer = GreedyTokenizer(names, **more)
    return SafeText(tokenizer, {tokenizer.ids[name]: name for name in control})


def named(encoder: SafeText, text: str, *spans: tuple[int, int], **more: Any) -> Named:
    """The tokens of `text` by their names, with the characters that they encode."""
    more["allowed"] = frozenset(encoder._tokenizer.ids[name] for name in more.get("allowed", ()))
    found = encoder.encode(text, spans, **more)
    return [(encoder._tokenizer.names[token.id], token.start, token.stop) for token in found]


def reference(text: str, spans: Collection[tuple[int, int]], allowed: Collection[str] = ()) -> Named:
    """Take the longest name that is not a control token inside a span.

    Such a name is cut behind its first character, or where its span begins or ends if it is only partly in it.
    """
    found: Named = []
    at = 0
    while at < len(text):
        stop = len(text)
        while True:
            name = max((each for each in (*PLAIN, *CONTROL) if text.startswith(each, at, stop)), key=len)
            end = at + len(name)
            touched = [(a, b) for a, b in spans if at < b and end > a]
            if name not in CONTROL or name in allowed or not touched:
                break
            if len(name) == 1:
                name = "<0x24>"
                break
            stop = min(a if at < a else b if end > b else at + 1 for a, b in touched)
        found.append((name, at, end))
        at = end
    return found


@pytest.mark.parametrize("allowed", [(), ("<x>",), ("##", "$")])
def test_spans_yield_no_control_tokens_and_all_else_is_as_without_spans(allowed: tuple[str, ...]) -> None:
    encoder, chance = safe(), random.Random(5)
    pieces = ("<x>", "##", "$", "a", "b", "ab", "<", "x", ">", "y", "#", " ")
    for _ in range(400):
        text = "".join(chance.choices(pieces, weights=[4, 3, 3, *[1] * 9], k=chance.randint(1, 6)))
        edges = sorted(chance.sample(range(len(text) + 1), min(2 * chance.randint(0, 2), (len(text) + 1) // 2 * 2)))
        spans = list(zip(edges[::2], edges[1::2], strict=True))
        assert named(encoder, text, *spans, allowed=allowed) == reference(text, spans, allowed), (text, spans)


def test_no_text_has_no_tokens() -> None:
    assert safe().encode("") == []
    assert safe().encode("", [(0, 0)], "a", "b") == []
    assert safe().tokens("") == []


def test_a_name_across_the_edge_of_a_span_is_cut_at_the_edge() -> None:
    encoder = safe()
    assert named(encoder, "a<x>b", (2, 5)) == [("a", 0, 1), ("<", 1, 2), ("x", 2, 3), (">", 3, 4), ("b", 4, 5)]
    assert named(encoder, "a<x>b", (0, 3)) == [("a", 0, 1), ("<", 1, 2), ("x", 2, 3), (">", 3, 4), ("b", 4, 5)]
    assert named(encoder, "<x><x>", (0, 3)) == [("<", 0, 1), ("x", 1, 2), (">", 2, 3), ("<x>", 3, 6)]
    assert named(encoder, "<x><x>", (3, 6)) == [("<x>", 0, 3), ("<", 3, 4), ("x", 4, 5), (">", 5, 6)]
    assert named(encoder, "$$$", (1, 2)) == [("$", 0, 1), ("<0x24>", 1, 2), ("$", 2, 3)]


@pytest.mark.parametrize("name", ["<0x24>", ""])
def test_a_sign_whose_only_token_is_a_control_token_is_bytes_if_there_are_any(name: str) -> None:
    encoder = safe(["a", ".", "$", *[name] * bool(name)], ["$"], unknown="<unk>")
    expected = name or "$"
    assert named(encoder, "a$a", (0, 3)) == [("a", 0, 1), (expected, 1, 2), ("a", 2, 3)]
    assert named(encoder, "$", (0, 1)) == [(expected, 0, 1)]
    assert named(encoder, "$") == [("$", 0, 1)]
    assert named(safe(["$", "<0x24>"], ["$"], last="<end>"), "$", (0, 1)) == [("<0x24>", 0, 1)]
    both = safe(["a", ".", "$", "<0x24>"], ["$", "<0x24>"])
    assert named(both, "$", (0, 1)) == [("$", 0, 1)]  # the byte is a control token as well


def test_a_sign_without_a_token_is_the_unknown_token_which_is_no_name_in_the_text() -> None:
    encoder = safe(["a", ".", *"<unk>"], ["<unk>"], unknown="<unk>")
    assert named(encoder, "aéa", (0, 3)) == [("a", 0, 1), ("<unk>", 1, 2), ("a", 2, 3)]
    assert named(encoder, "<unk>", (0, 5)) == [(sign, i, i + 1) for i, sign in enumerate("<unk>")]
    assert named(encoder, "a<unk>a", (0, 7)) == [(sign, i, i + 1) for i, sign in enumerate("a<unk>a")]
    assert named(encoder, "<unk>") == [("<unk>", 0, 5)]


def test_a_name_in_other_letters_is_cut_if_the_tokenizer_normalizes_it() -> None:
    encoder = safe(lowers=True, unknown="<unk>")
    assert named(encoder, "a<X>", (0, 4)) == [("a", 0, 1), ("<", 1, 2), ("x", 2, 3), (">", 3, 4)]


def test_a_name_next_to_a_span_is_not_cut_off() -> None:
    """After each neutral sign the tokens merge, so a text that is cut there is encoded as at the start of a text."""
    right = safe([*SIGNS, "c", "$", "^$", *(f"{sign}$" for sign in SIGNS)], ["$"])
    assert named(right, "c$", (0, 1)) == [("c", 0, 1), ("$", 1, 2)]
    left = safe([*SIGNS, "c", "$", "^c", *(f"{sign}c" for sign in SIGNS)], ["$"])
    assert named(left, "$c", (1, 2)) == [("$", 0, 1), ("c", 1, 2)]


# --- the text around --------------------------------------------------------------------------------------------

SIGNS = (".", "a", "\n", "1", ")")


def test_text_is_encoded_as_behind_the_text_to_its_left() -> None:
    encoder = safe(["^b", "^ab", "a", "b", "c", "ab", ".", ".b", "bc", "\n"], [])
    assert named(encoder, "b") == [("^b", 0, 1)]
    assert named(encoder, "b", left="c") == [("b", 0, 1)]
    assert named(encoder, "b", left="a") == [("b", 0, 1)]  # not "ab", nor ".b": an "a" would merge, a line end does not


@pytest.mark.parametrize("merging", range(6))
def test_a_text_to_the_left_that_would_merge_is_replaced_by_a_sign_that_does_not(merging: int) -> None:
    """If all of them merge, the text is encoded as at the start of a text."""
    names = [*SIGNS, "b", "c", "^b", "cb", *(f"{sign}b" for sign in SIGNS[:merging])]
    assert named(safe(names, []), "b", left="c") == [("^b" if merging == 5 else "b", 0, 1)]
    assert named(safe(names, []), "bb", left="c") == [("^b" if merging == 5 else "b", 0, 1), ("b", 1, 2)]
    control = [*names, "$", "<0x24>"]
    pieces = named(safe(control, ["$"]), "$b", (0, 2))
    assert pieces == [("<0x24>", 0, 1), ("^b" if merging == 5 else "b", 1, 2)]


def test_a_sign_that_is_a_control_token_does_not_precede_a_piece() -> None:
    """Some tokenizers encode text after a control token as at the start of a text."""
    encoder = safe([*SIGNS, "b", "^b", "$", "<0x24>"], ["$", "."], opens=".")
    assert named(encoder, "$b", (0, 2)) == [("<0x24>", 0, 1), ("b", 1, 2)]


def test_text_to_the_right_decides_unless_a_token_would_span_both() -> None:
    encoder = safe(["a", "b", "c", ".", "bc", "abc"], [])
    assert named(encoder, "a", right="b") == [("a", 0, 1)]
    assert named(encoder, "ab", right="a") == [("a", 0, 1), ("b", 1, 2)]
    assert named(encoder, "ab", right="c") == [("a", 0, 1), ("b", 1, 2)]
    assert named(encoder, "ab", right="cc", left="c") == [("a", 0, 1), ("b", 1, 2)]


def test_of_a_cut_text_only_the_last_piece_is_followed_by_the_text_to_the_right() -> None:
    """A token at the end of each text, without characters, is there once, and only if nothing follows."""
    encoder = safe([*"<>xab.", "<x>"], ["<x>"], last="<end>")
    merging = safe(["a", "b", "ab"], [], last="<end>")
    assert named(merging, "a", right="b") == named(merging, "a") == [("a", 0, 1), ("<end>", 1, 1)]
    text = [("a", 0, 1), ("<", 1, 2), ("x", 2, 3), (">", 3, 4)]
    assert named(encoder, "a", right="b") == [("a", 0, 1)]
    assert named(encoder, "a") == [("a", 0, 1), ("<end>", 1, 1)]
    assert [token for token in named(encoder, "a<x>", (0, 4), right="b") if token[0] != "<end>"] == text
    assert named(encoder, "a<x>", (0, 4), right="b")[-1] == text[-1]


# --- tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("trims", [True, False])
def test_tokens_have_no_gaps_however_the_tokenizer_reports_offsets(is_fast: bool, trims: bool) -> None:
    encoder = safe(["a", " b", " ", "cc", " ."], [], is_fast=is_fast, trims=trims)
    assert spans_of(encoder, "a b cc .") == [("a", 0, 1), (" b", 1, 3), (" ", 3, 4), ("cc", 4, 6), (" .", 6, 8)]
    assert spans_of(encoder, " ba") == [(" b", 0, 2), ("a", 2, 3)]
    assert named(encoder, " b cc", left="a") == [(" b", 0, 2), (" ", 2, 3), ("cc", 3, 5)]
    if not is_fast:
        del encoder._tokenizer.is_fast  # as in tokenizers of other libraries
        assert spans_of(encoder, " ba") == [(" b", 0, 2), ("a", 2, 3)]


def test_decoded_tokens_that_are_longer_than_the_text_end_with_it() -> None:
    """As those of a tokenizer without offsets that writes more than it read."""
    encoder = safe(["a"], [], is_fast=False)
    encoder._tokenizer.decode = lambda ids, **_: "▁a"
    assert [token[1:] for token in encoder.tokens("aaa")] == [(0, 2), (2, 3), (3, 3)]


def spans_of(encoder: SafeText, text: str) -> Named:
    """All tokens of `text` by their names, with the characters that they encode."""
    return [(encoder._tokenizer.names[token.id], token.start, token.stop) for token in encoder.tokens(text)]
