"""Ranking of evicted turns by a message: what matches, what does not, and how it compares with plain BM25."""

from __future__ import annotations

import random
from array import array
from itertools import pairwise
from typing import Any

import pytest

from streamchat.conversation.log import TokenLog, TurnRecord
from streamchat.conversation.passages import LONG, OVERLAP, SHORT, Passages
from streamchat.conversation.recall_ranking import rank
from streamchat.store.passages import PassageIndex, words_of
from tests.support.toy_tokenizer import toy_tokenizer

FILLER = [
    "Tell me about the history of bread.\nPeople have baked bread for more than ten thousand years.",
    "What should I cook tonight?\nA soup with lentils and carrots is quick and cheap.",
    "I am tired of the rain.\nIt rains a lot at this time of the year.",
    "Can you recommend a film?\nThe old comedies are still worth watching.",
    "How far away is the moon?\nThe moon is about 384,000 kilometers away.",
    "Thanks for that.\nYou are welcome.",
]

PEOPLE = "Alma Brice Conrad Dilys Edgar Fenna Gustav Hilde Ivor Jonna Kasimir Lorne Mattia Nils Orla Percy"
THINGS = "shed safe locker luggage gate cabin cellar archive rack garage vault kiosk trunk attic depot box"


def index_of(*texts: str) -> PassageIndex:
    index = PassageIndex()
    index.add(texts)
    return index


def ranked(message: str, *texts: str) -> list[int]:
    return [match.passage for match in rank(message, index_of(*texts))]


@pytest.mark.parametrize(
    ("message", "fact"),
    [
        ("What is the code of the garden shed?", "The code for the garden shed is 48213."),
        ("Which codes did I give you for sheds?", "The code for the garden shed is 48213."),  # stems
        ("Where did Zoë park?", "Zoe parked behind the station."),  # diacritics
        ("What about order 7741?", "Order 7741 has not arrived."),
        ("我的密码是什么？", "请记住，我的密码是四八二一三。"),
        ("locker?", "My locker is number 17."),
        ("Große Straße?", "Sie wohnt in der großen Straße, Große 5."),  # FTS5 does not write ß as ss
        ("ποιος είναι ο κωδικός;", "Ο κωδικός της πόρτας είναι τέσσερα."),  # nor ς as σ
        ("Ma\u0323\u0302t kha\u0302\u0309u?", "Ma\u0323\u0302t kha\u0302\u0309u của tôi."),  # accents on their own
        ("अलमारी का कोड क्या है?", "मेरी अलमारी का कोड नीला है।"),
    ],
)
def test_a_fact_is_first_for_a_question_in_other_words(message: str, fact: str) -> None:
    at = len(FILLER) // 2
    assert ranked(message, *FILLER[:at], fact, *FILLER[at:])[0] == at


@pytest.mark.parametrize(
    "message",
    ["", "Thanks!", "Yes, please go on.", "What do you think about that?", "Write a poem on submarines.", "..."],
)
def test_a_message_that_asks_for_nothing_matches_nothing(message: str) -> None:
    assert ranked(message, "The code for the garden shed is 48213.", *FILLER) == []


def test_words_of_scripts_with_vowel_signs_are_words() -> None:
    """Their consonants alone are in almost every passage."""
    assert words_of("अलमारी का कोड") == ["अलमारी", "का", "कोड"]
    fact, other = "मेरी अलमारी का कोड नीला है।", "कल डाक रात मेल रोक मार कर"
    assert ranked("अलमारी कोड", *FILLER, other, fact, other) == [len(FILLER) + 1]


def test_one_shared_word_of_many_is_no_match() -> None:
    fact = "The code for the garden shed is 48213."
    assert ranked("Compare French and English garden design in the eighteenth century.", fact, *FILLER) == []


def test_the_newer_of_two_equal_passages_is_first() -> None:
    fact = "The code of the safe is 11111."
    assert ranked("the code of the safe?", fact, *FILLER, fact, *FILLER) == [len(FILLER) + 1, 0]


def test_a_long_message_is_looked_up_by_its_start_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    having = PassageIndex.having

    def noted(index: PassageIndex, word: str, most: int) -> list[int] | None:
        asked.append(word)
        return having(index, word, most)

    monkeypatch.setattr(PassageIndex, "having", noted)
    words = [f"word{number}" for number in range(5000)]
    rank(" ".join(words), index_of(*FILLER))
    assert (asked[0], asked[-1], len(asked)) == ("word0", "word4999", 64)


def test_a_common_word_is_looked_up_no_further_than_its_limit() -> None:
    index = index_of(*["The lantern of the harbor."] * 40, "A violin.")
    assert index.having("lantern", 40) == list(range(40))
    assert index.having("lantern", 39) is None
    assert index.having("lantern", 0) is None
    assert index.having("violins", 1) == [40]  # by its stem
    assert index.having("copper", 0) == []


def test_planted_facts_rank_as_well_as_with_plain_bm25() -> None:
    """200 facts about 20 people and 20 things, so that every word of a question occurs in many turns."""
    rng = random.Random(3)
    people = PEOPLE.split()
    things = THINGS.split()
    facts = rng.sample([(person, thing) for person in people for thing in things], 200)
    says = ("The code of {0}'s {1} is {2}.", "Note that {0} opens the {1} with {2}.", "{0}, {1}: {2}")
    asks = ("What is the code of {0}'s {1}?", "How do I open the {1} of {0}?", "I forgot what {0} uses for the {1}.")
    texts = []
    for person, thing in facts:
        texts += [rng.choice(says).format(person, thing, rng.randint(10_000, 99_999)), rng.choice(FILLER)]
    index, found, plain = index_of(*texts), 0, 0
    for number, fact in enumerate(facts):
        question = rng.choice(asks).format(*fact)
        found += 2 * number in [match.passage for match in rank(question, index)[:3]]
        plain += 2 * number in [passage for passage, _ in index.bm25(words_of(question))[:3]]
    assert found >= max(180, plain - 4)


# --- passages ---------------------------------------------------------------------------------------------------


def log_of(*texts: str) -> TokenLog:
    tokenizer, log = toy_tokenizer(), TokenLog()
    for text in texts:
        add(log, text, tokenizer)
    return log


def add(log: TokenLog, text: str, tokenizer: Any = None) -> TurnRecord:
    ids = (tokenizer or toy_tokenizer()).encode(text, add_special_tokens=False)
    turn = TurnRecord(len(log.turns) + 1, len(log), len(log), end=len(log) + len(ids), text=text)
    log.append(array("i", ids))
    log.turns.append(turn)
    return turn


def test_passages_cover_every_turn_and_end_with_sentences() -> None:
    log = log_of("One short turn.", "It is. It was. " * 40)
    passages = Passages(log, toy_tokenizer())
    passages.update()
    for turn in log.turns:
        mine = [passage for passage in passages.all if passage.turn == turn.number]
        assert (mine[0].first, mine[-1].stop) == (turn.start, turn.end)
        for passage, following in pairwise(mine):
            assert SHORT <= following.first - passage.first <= LONG
            assert passage.stop == min(following.first + OVERLAP, turn.end or 0)
            assert passages.text_of(following).startswith(" It")
    assert passages.index.count == len(passages.all) > 4


def test_passages_follow_undo_and_other_turns_in_the_same_place() -> None:
    log = log_of("The safe is green.", "The gate is blue.")
    passages = Passages(log, toy_tokenizer())
    passages.update()
    log.cut(log.turns[1].start)
    del log.turns[1]
    add(log, "The shed is red.")
    running = add(log, "The kiosk")
    running.end = None
    passages.update()
    assert [passages.text_of(passage) for passage in passages.all] == ["The safe is green.", "The shed is red."]
    assert [len(passages.index.having(word, 9) or []) for word in ("safe", "gate", "shed", "kiosk")] == [1, 0, 1, 0]
    log.clear()
    add(log, "The vault is black.")
    passages.update()
    assert [len(passages.index.having(word, 9) or []) for word in ("safe", "shed", "vault")] == [0, 0, 1]
