"""Ranks the passages of a conversation by the words that they share with a message.

The score of a passage is the sum of the weights of these words. Like in BM25, a rare word has a larger weight (inverse
document frequency). Unlike in BM25, a word counts once per passage, whatever the length of the passage; stop words and
very frequent words do not count; numbers and names count more; and of two equal passages, the newer one ranks first. A
passage that shares little with the message is not in the result, because most messages need no evicted turn.
`streamchat recall-bench` compares the ranking with BM25.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from streamchat.store.passages import PassageIndex, words_of

MOST_WORDS = 64
"""Maximum number of words of a message that are used, half of them from its start and half from its end."""
COMMON = 0.25
"""A word in more than this share of the passages does not count ..."""
FEW = 8
"""... unless it is in at most this number of them."""
MOST_PASSAGES = 500
"""A word in more passages than this does not count either, which bounds the time to rank in a long conversation."""
NAME_WEIGHT = 1.5
"""Factor for a number, or for a word with a capital letter that is not the first word of the message."""
UNKNOWN_WEIGHT = 0.5
"""Factor for a word that no passage has."""
RECENCY = 0.05
"""The newest passage scores this share more than the oldest one."""
LEAST_SHARE = 0.6
"""A passage matches if the words that it shares with the message have at least this share of the weight of all words of
the message ..."""
LEAST_WORDS = 2
"""... if these are at least this number of words, or all words of a shorter message ..."""
LEAST_SCORE = 0.6
"""... and if their score is at least this multiple of the score of a word that only one passage has."""

_STOP_WORDS = (
    "a about after again all also am an and any are aren as ask asked at back be because been before being but by can "
    "could did didn do does doesn doing don down each else even ever every few for forget forgot from get give go "
    "good got had has have having he hello help her here hers hey hi him his how however i if in into is isn it its "
    "just know let like ll look make many may maybe me mean might mine more most much must my myself need no nor not "
    "now of off ok okay on once one only or other our ours out over own please re really remember remind right said "
    "same say see shall she should show so some something still such sure take tell than thank thanks that the their "
    "theirs them then there these they thing things think this those through to too try under until up us use used "
    "uses using ve very want was wasn way we well were what when where which while who whom whose why will with won "
    "would yes yet you your yours"
)
_IS_STOP_WORD = frozenset(_STOP_WORDS.split()).__contains__


@dataclass(frozen=True)
class Match:
    """A passage that shares words with a message."""

    passage: int
    score: float


def rank(message: str, index: PassageIndex) -> list[Match]:
    """Return the passages of `index` that match the message, the best one first."""
    weights = content_words(message)
    scores: dict[int, float] = {}
    counts: dict[int, int] = {}
    total = 0.0
    most = max(FEW, min(int(COMMON * index.count), MOST_PASSAGES))
    for word, weight in weights.items():
        found = index.having(word, most)
        if found is None:
            continue
        weight *= 1.0 if found else UNKNOWN_WEIGHT
        weight *= math.log(1 + (index.count - len(found) + 0.5) / (len(found) + 0.5))
        total += weight
        for passage in found:
            scores[passage] = scores.get(passage, 0.0) + weight
            counts[passage] = counts.get(passage, 0) + 1
    single = math.log(1 + (index.count - 0.5) / 1.5)
    least = min(LEAST_WORDS, len(weights))
    matches = [
        Match(passage, score * (1 + RECENCY * passage / index.count))
        for passage, score in scores.items()
        if score >= LEAST_SHARE * total and counts[passage] >= least and score >= LEAST_SCORE * single
    ]
    return sorted(matches, key=lambda match: -match.score)


def content_words(message: str) -> dict[str, float]:
    """Return the words of a message that count for the ranking, in lower case, each with its factor."""
    words = words_of(message)
    if len(words) > MOST_WORDS:
        words = [*words[: MOST_WORDS // 2], *words[-MOST_WORDS // 2 :]]
    weights: dict[str, float] = {}
    for number, word in enumerate(words):
        folded = "".join(map(str.lower, word))  # as FTS5 does: it does not write ß as ss, or ς as σ
        if _IS_STOP_WORD(folded) or (len(word) == 1 and word.isascii() and not word.isdigit()):
            continue
        is_name = any(sign.isdigit() for sign in word) or (number > 0 and word[0].isupper())
        weights[folded] = NAME_WEIGHT if is_name else weights.get(folded, 1.0)
    return weights
