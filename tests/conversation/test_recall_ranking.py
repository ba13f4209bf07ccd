"""Ranking of evicted turns by a message: what matches, what does not, and how it compares with plain BM25."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Iterable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from streamchat.conversation.log import TokenLog, TurnRecord
from streamchat.conversation.passages import LONG, OVERLAP, SHORT, Passage, PassageList, Passages
from streamchat.conversation.recall_ranking import content_words, rank
from streamchat.store.passages import PassageIndex, words_of
from tests.support.toy_tokenizer import joining_tokenizer, toy_tokenizer

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


# --- exact weights, scores, and passages ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "weights"),
    [
        ("", {}),
        ("What is the blue Safe of zoe?", {"blue": 1.0, "safe": 1.5, "zoe": 1.0}),
        ("Blue safe", {"blue": 1.0, "safe": 1.0}),  # a capital at the start of a message is no name
        ("safe Safe safe", {"safe": 1.5}),
        ("x 7 b2 é Z", {"7": 1.5, "b2": 1.5, "é": 1.0}),  # single letters of ASCII do not count
        ("4 safe", {"4": 1.5, "safe": 1.0}),
        ("Straße", {"straße": 1.0}),
    ],
)
def test_words_have_weights(message: str, weights: dict[str, float]) -> None:
    assert content_words(message) == weights


@pytest.mark.parametrize(
    ("count", "kept"),
    [(64, range(64)), (65, [*range(32), *range(33, 65)]), (100, [*range(32), *range(68, 100)])],
)
def test_of_a_long_message_32_words_of_each_end_have_weights(count: int, kept: Iterable[int]) -> None:
    words = [f"word{number:03}" for number in range(count)]
    assert list(content_words(" ".join(words))) == [words[number] for number in kept]


def test_scores_are_those_of_the_formula() -> None:
    """Random words, some of them in most passages: passages, scores, and order are those of a plain computation."""
    rng = random.Random(4)
    words = [f"w{letter}{letter}" for letter in "bcdfghjklmnpqrtvwxz"]
    matched = 0
    for _ in range(60):
        few = rng.sample(words, rng.randint(3, 9))
        texts = [" ".join(rng.choices(few, k=rng.randint(1, 5))) for _ in range(rng.randint(1, 40))]
        message = " ".join(rng.choices([*few, "wunknownw", *(word.capitalize() for word in few)], k=rng.randint(1, 3)))
        expected = scores_of(message, texts)
        found = rank(message, index_of(*texts))
        assert [match.passage for match in found] == [passage for passage, _ in expected]
        assert [match.score for match in found] == pytest.approx([score for _, score in expected])
        matched += len(found) > 1
    assert matched > 5


def scores_of(message: str, texts: list[str]) -> list[tuple[int, float]]:
    """Score every passage by itself, as the constants of the module describe it."""
    count, weights = len(texts), dict[str, float]()
    for number, word in enumerate(message.split()):
        weight = 1.5 if number and word[0].isupper() else 1.0
        weights[word.lower()] = max(weight, weights.get(word.lower(), 0))
    having = {word: [i for i, text in enumerate(texts) if word in text.split()] for word in weights}
    counted = {word: found for word, found in having.items() if not (len(found) > 8 and len(found) > count / 4)}
    values = {
        word: weights[word] * (1.0 if found else 0.5) * math.log(1 + (count - len(found) + 0.5) / (len(found) + 0.5))
        for word, found in counted.items()
    }
    result = []
    for passage in range(count):
        shared = [word for word, found in counted.items() if passage in found]
        score = sum(values[word] for word in shared)
        is_enough = len(shared) >= min(2, len(weights)) and score >= 0.6 * math.log(1 + (count - 0.5) / 1.5)
        if is_enough and score >= 0.6 * sum(values.values()):
            result.append((passage, score * (1 + 0.05 * passage / count)))
    return sorted(result, key=lambda each: (-each[1], -each[0]))


def test_a_word_that_is_hardly_rare_enough_matches_by_itself() -> None:
    """Of 38 passages, 5 with a word score 1.002 times the least score, and 6 less than it."""
    assert ranked("shed", *["shed"] * 5, *["gate"] * 33) == [4, 3, 2, 1, 0]
    assert ranked("shed", *["shed"] * 6, *["gate"] * 32) == []


def test_a_common_word_does_not_hide_the_words_after_it() -> None:
    assert ranked("gate shed vault", *["gate shed"] * 2, "shed vault", *["gate"] * 20) == [2]


def test_a_list_of_passages_is_read_by_number_in_order_and_by_turn() -> None:
    passages, listed = [Passage(1, 0, 30), Passage(1, 24, 50), Passage(3, 50, 61)], PassageList()
    for passage in passages:
        listed.append(passage)
    assert (len(listed), list(listed), listed[1]) == (3, passages, passages[1])
    assert [listed.first_of(turn) for turn in (1, 3)] == [passages[0], passages[2]]
    assert listed[2].run == (50, 61)
    listed.cut(1)
    assert list(listed) == passages[:1]
    listed.append(passages[2])
    assert list(listed) == [passages[0], passages[2]]


@pytest.mark.parametrize("length", [1, 23, 24, 40, 51, 52, 53, 54, 76, 77, 92, 93, 130])
def test_passages_are_those_of_the_rule(length: int) -> None:
    """Ends of sentences in random places; a next passage starts after one of them, or after 40 tokens."""
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens(["。", "！", "？", ". ", ".X"])
    words = tokenizer.convert_tokens_to_ids(["a", "s", ".X"])
    ends = tokenizer.convert_tokens_to_ids([*".!?:;", "Ċ", "。", "！", "？", ". "])
    for seed in range(6):
        rng = random.Random(100 * length + seed)
        ids = [rng.choice(ends) if rng.random() < 0.02 * seed else rng.choice(words) for _ in range(length)]
        log = TokenLog()
        log.append([*words[:2], *ids])
        log.turns = [TurnRecord(1, 2, 2, end=2 + length)]
        passages = Passages(log, tokenizer)
        passages.update()
        starts = [0]
        while length - starts[-1] > 52:
            at = starts[-1]
            after = [stop for stop in range(at + 24, at + 40) if ids[stop - 1] in ends]
            starts.append(after[0] if after else at + 40)
        expected = [Passage(1, 2 + a, 2 + min(length, b + 12)) for a, b in pairwise([*starts, length])]
        assert list(passages.all) == expected


def test_a_passage_is_the_text_of_message_and_reply_without_openings_and_control_tokens() -> None:
    tokenizer = joining_tokenizer()
    opening, message, answer = "<|im_start|>user\n", "Is it , then ?<|im_end|>", "It is ."
    parts = [tokenizer.encode(text, add_special_tokens=False) for text in (opening, message, "assistant\n", answer)]
    sizes = [len(part) for part in parts]
    log = TokenLog()

    def turn(number: int, prompt_end: bool) -> TurnRecord:
        start = len(log)
        log.append([token for part in parts for token in part])
        reply = start + sizes[0] + sizes[1]
        made = TurnRecord(number, start, start + sizes[0], reply, end=len(log))
        made.prompt_end = reply + sizes[2] if prompt_end else None
        log.turns.append(made)
        return made

    turn(1, False)
    passages = Passages(log, tokenizer)
    whole = [Passage(1, 0, len(log))]
    assert [passages.text_of(each) for each in whole] == ["Is it , then ?\nassistant\nIt is ."]  # nothing tells
    second = turn(2, True)
    whole.append(Passage(2, second.start, len(log)))
    assert [passages.text_of(each) for each in whole] == ["Is it , then ?\nIt is ."] * 2
    assert second.reply_start is not None
    assert passages.text_of(Passage(2, second.start, second.reply_start)) == "Is it , then ?"
    assert passages.text_of(Passage(2, second.reply_start + 1, len(log))) == "It is ."
    assert passages.text_of(Passage(2, second.start + sizes[0] + 1, second.reply_start)) == "s it , then ?"
    log.turns[1].reply_start = None  # not known: all behind the opening is the message
    assert passages.text_of(whole[1]) == "Is it , then ?assistant\nIt is ."


def test_only_finished_turns_are_indexed_and_each_once() -> None:
    log, tokenizer, decoded = log_of("The safe is green.", "The gate is blue."), toy_tokenizer(), list[list[int]]()

    def decode(ids: list[int], **how: Any) -> Any:
        decoded.append(ids)
        return tokenizer.decode(ids, **how)

    passages = Passages(log, SimpleNamespace(decode=decode))
    for _ in range(2):
        passages.update()
        assert (passages.index.count, len(passages.all)) == (2, 2)
        assert len(decoded) == 2
    running = add(log, "The shed is red.")
    running.end, later = None, add(log, "The kiosk is white.")
    passages.update()
    assert passages.index.count == 2  # nothing behind a running turn
    running.end = later.start
    passages.update()
    assert [each.turn for each in passages.all] == [1, 2, 3, 4]
    del log.turns[1:]
    passages.update()
    assert (passages.index.count, len(passages.all)) == (1, 1)
