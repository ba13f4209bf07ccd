"""The index of n-grams on short texts with known matches, and the sizes of its tables."""

from __future__ import annotations

import random

import pytest

from streamchat.conversation.log import TokenLog
from streamchat.conversation.speculation.ngrams import Match, NgramIndex, continuation


def indexed(text: list[int]) -> tuple[NgramIndex, TokenLog]:
    index, log = NgramIndex(), TokenLog()
    log.append(text)
    index.update(log)
    return index, log


@pytest.mark.parametrize("is_long", [False, True])  # a long text is hashed by NumPy
@pytest.mark.parametrize(("older", "newer"), [(8, 7), (4, 3), (7, 4), (3, 2), (2, 1), (12, 9)])
def test_a_match_of_8_tokens_is_better_than_one_of_4_and_that_than_one_of_2(
    older: int, newer: int, is_long: bool
) -> None:
    """Of two places, the later one is taken unless a longer n-gram is at the older one."""
    newest = list(range(1, 13))
    filler = list(range(200, 260)) if is_long else []
    before = [*filler, 100, *newest[-older:]]
    after = [101, *newest[-newer:]]
    text = [*before, *after, 102, *newest]
    same = [max(size for size in (8, 4, 2, 0) if size <= count) for count in (older, newer)]
    expected = Match(len(before) + len(after), newer) if same[0] == same[1] else Match(len(before), older)
    index, log = indexed(text[:-1])
    assert index.find(log, text[-1]) == expected


@pytest.mark.parametrize("count", [1, 2, 3, 31, 32, 33, 40])
def test_matched_tokens_are_counted_up_to_32_and_one_is_no_match(count: int) -> None:
    newest = list(range(1, count + 1))
    index, log = indexed([100, *newest, 101, *newest[:-1]])
    assert index.find(log, newest[-1]) == (Match(1 + count, min(count, 32)) if count > 1 else None)
    index, log = indexed([*newest, 101, *newest[:-1]])  # at the start of the text
    assert index.find(log, newest[-1]) == (Match(count, min(count, 32)) if count > 1 else None)


def test_each_length_has_a_table_with_two_slots_per_token_from_16_384_to_262_144() -> None:
    def sizes(index: NgramIndex) -> list[int]:
        return [len(table) for table in index._tables.values()]

    index, log = indexed([])
    assert sizes(index) == [1 << 14] * 3
    assert [*index._tables] == [8, 4, 2]
    for tokens, slots in ((8192, 14), (8193, 16), (40_000, 18), (140_000, 18)):
        log.append([7] * (tokens - len(log)))
        index.update(log)
        assert sizes(index) == [1 << slots] * 3
        assert index._slots == 1 << slots
    assert sizes(indexed([7] * 16_384)[0]) == [1 << 16] * 3
    index.clear()
    assert sizes(index) == [1 << 14] * 3
    assert (index._slots, index._count) == (1 << 14, 0)


@pytest.mark.parametrize("step", [1, 7, 40])
def test_text_is_indexed_piece_by_piece_as_at_once(step: int) -> None:
    rng, text = random.Random(3), list[int]()
    for _ in range(120):
        start = rng.randrange(max(1, len(text) - 30))
        text += text[start : start + rng.randrange(14)] if rng.random() < 0.5 else [rng.randrange(8)]
    index, log = NgramIndex(), TokenLog()
    for start in range(0, len(text), step):
        log.append(text[start : start + step])
        index.update(log)
        assert (log.unchanged, index._count) == (len(log), len(log))
    once, _ = indexed(text)
    assert index._tables == once._tables
    log.cut(len(text) // 2)
    log.append(text[len(text) // 2 :])
    index.update(log)
    assert index._tables == once._tables


def test_places_that_were_cut_are_no_matches() -> None:
    index, log = indexed([5] * 12)
    for left in (11, 7, 3):
        log.cut(left)
        index.update(log)
        assert index.find(log, 5) is None


def test_a_larger_table_has_all_tokens() -> None:
    text = [*range(3000, 3009), *([7] * 8180)]
    index, log = indexed(text)
    log.append([*range(3000, 3008)])
    index.update(log)
    assert index._slots == 1 << 16
    assert index.find(log, 3008) == Match(9, 9)


def test_a_continuation_is_what_followed_and_then_repeats() -> None:
    log = TokenLog()
    log.append([1, 2, 3, 4, 1])
    assert continuation(log, 2, Match(2, 2), 1) == [3]
    assert continuation(log, 2, Match(2, 2), 3) == [3, 4, 1]
    assert continuation(log, 2, Match(2, 2), 6) == [3, 4, 1, 2, 3, 4]
