"""Scores of passages, against the formula of the docstring written out, and at its limits."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest

from streamchat.conversation.recall_ranking import Match, content_words, rank

WORDS = ["harbor", "lantern", "Velvet", "4711", "copper", "Meadow", "violin", "granite", "b52", "Juniper"]


class Index:
    """Passages as sets of words."""

    def __init__(self, passages: list[set[str]]) -> None:
        self.passages, self.count = passages, len(passages)

    def having(self, word: str, most: int) -> list[int] | None:
        found = [number for number, words in enumerate(self.passages) if word in words]
        return found if len(found) <= most else None


def ranked(message: str, passages: list[set[str]]) -> list[Match]:
    index: Any = Index(passages)
    return rank(message, index)


def expected(message: str, passages: list[set[str]]) -> list[Match]:
    """The definition, for messages of known words."""
    weights: dict[str, float] = {}
    for place, word in enumerate(message.split()):
        is_name = any(sign.isdigit() for sign in word) or (place > 0 and word[0].isupper())
        weights[word.lower()] = max(weights.get(word.lower(), 0), 1.5 if is_name else 1.0)
    count, total, scores = len(passages), 0.0, dict[int, float]()
    having = {word: [number for number in range(count) if word in passages[number]] for word in weights}
    for word, weight in weights.items():
        found = len(having[word])
        if found <= max(8, 0.25 * count):
            value = weight * (1.0 if found else 0.5) * math.log(1 + (count - found + 0.5) / (found + 0.5))
            total += value
            for number in having[word]:
                scores[number] = scores.get(number, 0.0) + value
    single = math.log(1 + (count - 0.5) / 1.5)
    matches = []
    for number, score in scores.items():
        shared = sum(number in having[word] for word in weights if len(having[word]) <= max(8, 0.25 * count))
        if score >= 0.6 * total and shared >= min(2, len(weights)) and score >= 0.6 * single:
            matches.append(Match(number, score * (1 + 0.05 * number / count)))
    return sorted(matches, key=lambda match: (-match.score, -match.passage))


def test_scores_are_those_of_the_definition() -> None:
    rng, matches = random.Random(7), 0
    for _ in range(1500):
        count = rng.choice([1, 3, 12, 40, 60])
        passages = [{word.lower() for word in rng.sample(WORDS, rng.randint(0, 3))} for _ in range(count)]
        message = " ".join(rng.choices(WORDS, k=rng.randint(1, 5)))
        found, wanted = ranked(message, passages), expected(message, passages)
        assert [match.passage for match in found] == [match.passage for match in wanted], (message, passages)
        assert [match.score for match in found] == pytest.approx([match.score for match in wanted])
        matches += len(found)
    assert matches > 300


@pytest.mark.parametrize(
    ("count", "having", "is_found"),
    [
        *[(20, 8, True), (20, 9, False), (40, 10, True), (40, 11, False), (43, 10, True), (43, 11, False)],
        *[(1999, 499, True), (1999, 500, False), (8000, 500, True), (8000, 501, False)],
    ],
)
def test_a_word_of_many_passages_does_not_count(count: int, having: int, is_found: bool) -> None:
    passages = [{"harbor", "lantern"}, *[{"harbor"}] * (having - 1), *[{"other"}] * (count - having)]
    assert [match.passage for match in ranked("harbor lantern", passages)] == ([0] if is_found else [])


def test_no_passages_and_no_words_match_nothing() -> None:
    assert ranked("harbor", []) == []
    assert ranked("what is the of", [{"harbor", "the"}]) == []


@pytest.mark.parametrize(
    ("message", "weights"),
    [
        ("Harbor lantern", {"harbor": 1.0, "lantern": 1.0}),  # the first word has a capital letter anyway
        ("the Harbor", {"harbor": 1.5}),
        ("harbor Harbor harbor", {"harbor": 1.5}),
        ("room b52 and 7 and a b x", {"room": 1.0, "b52": 1.5, "7": 1.5}),
        ("The What Please YOU", {}),
        ("我 é", {"我": 1.0, "é": 1.0}),
    ],
)
def test_names_and_numbers_count_more_and_single_letters_not(message: str, weights: dict[str, float]) -> None:
    assert content_words(message) == weights


def test_half_of_the_words_of_a_long_message_are_from_its_start() -> None:
    words = [f"w{number}x" for number in range(65)]
    assert list(content_words(" ".join(words[:64]))) == words[:64]
    assert list(content_words(" ".join(words))) == [*words[:32], *words[33:]]


def test_the_newer_of_two_passages_scores_up_to_a_twentieth_more() -> None:
    passages = [{"harbor"}, *[{"other"}] * 5, {"harbor"}, *[{"other"}] * 5]
    second, first = sorted(ranked("harbor", passages), key=lambda match: match.passage)
    assert (second.passage, first.passage) == (0, 6)
    assert first.score / second.score == pytest.approx(1 + 0.05 * 6 / 12)


def test_the_index_is_asked_for_folded_words() -> None:
    asked: list[str] = []

    def having(word: str, most: int) -> list[int]:
        asked.append(word)
        return []

    index: Any = SimpleNamespace(count=3, having=having)
    assert rank("Harbor STRASSE", index) == []
    assert asked == ["harbor", "strasse"]
