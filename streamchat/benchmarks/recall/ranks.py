"""Ranks the turns of long chats by questions about one of them: in the words of the turn, and in other words."""

from __future__ import annotations

import json
import random
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from streamchat.benchmarks.recall.filler import NOTED, Fact, make_facts
from streamchat.conversation.log import TokenLog, TurnRecord
from streamchat.conversation.passages import Passages
from streamchat.conversation.recall_ranking import rank
from streamchat.store.passages import PassageIndex, words_of

BEST = 3
"""A right turn counts as found if it is among this many best ones."""
SPACING = 3
"""Turns between two facts with digits."""
WIDE_SPACING = 10
"""Turns between two other facts, so that their chats have hundreds of turns as well."""


@dataclass(frozen=True)
class RankFigures:
    """How many questions of one kind find their turn."""

    kind: str
    """'digits'; 'direct', in the words of the turn; or 'paraphrased', without any content word of the turn."""
    questions: int
    turns: int
    """Turns of each chat."""
    ranked_first: int
    """Questions whose turn the ranking of `auto_recall` has first ..."""
    ranked: int
    """... and among the `BEST` best ones."""
    bm25_first: int
    """The same with FTS5's BM25 over whole turns and all words of the question."""
    bm25: int


def read_paraphrases() -> list[dict[str, str]]:
    """Return facts with the keys `statement`, `direct`, and `paraphrased`; the last two ask for the fact."""
    text = (resources.files("streamchat.benchmarks.recall") / "paraphrases.json").read_text(encoding="utf-8")
    facts: list[dict[str, str]] = json.loads(text)
    return facts


def measure_ranks(tokenizer: Any, count: int, filler: Iterator[tuple[str, str]], seed: int) -> list[RankFigures]:
    """Rank the turns of chats with many facts by `count` questions of each kind. Runs no model.

    Args:
        tokenizer: Encodes the turns.
        count: Questions of each kind. Those that are not about digits are asked again in more chats with other turns.
        filler: The turns between the facts.
        seed: Of the digits, and of the order of the other facts.
    """
    facts = make_facts(count, seed)
    figures = [_figures("digits", [RankedChat(tokenizer, facts, filler, SPACING)], [facts])]
    rng, pairs = random.Random(seed), read_paraphrases()
    chosen = list[list[dict[str, str]]]()
    while (left := count - sum(map(len, chosen))) > 0:
        chosen.append(rng.sample(pairs, min(left, len(pairs))))
    chats = [RankedChat(tokenizer, _facts(some, "direct"), filler, WIDE_SPACING) for some in chosen]
    for kind in ("direct", "paraphrased"):
        figures.append(_figures(kind, chats, [_facts(some, kind) for some in chosen]))
    return figures


def _facts(pairs: Sequence[dict[str, str]], kind: str) -> list[Fact]:
    return [Fact(pair["statement"], pair[kind], "") for pair in pairs]


def _figures(kind: str, chats: Sequence[RankedChat], facts: Sequence[Sequence[Fact]]) -> RankFigures:
    counts = Counter[str]()
    for chat, some in zip(chats, facts, strict=True):
        for fact in some:
            right = chat.turn_of[fact.statement]
            for name, best in (("ranked", chat.ranked(fact.question)), ("bm25", chat.bm25(fact.question))):
                counts[name] += right in best
                counts[f"{name}_first"] += right in best[:1]
    names = ("ranked_first", "ranked", "bm25_first", "bm25")
    turns = max(chat.turns for chat in chats)
    return RankFigures(kind, sum(map(len, facts)), turns, **{name: counts[name] for name in names})


class RankedChat:
    """The text of a chat that states `facts`, with `spacing` other turns after each, and the indices of its words."""

    def __init__(self, tokenizer: Any, facts: Sequence[Fact], filler: Iterator[tuple[str, str]], spacing: int) -> None:
        self.log, self._whole = TokenLog(), PassageIndex()
        log = self.log
        self.turn_of: dict[str, int] = {}
        """Statement of a fact -> its turn."""
        for fact in facts:
            self.turn_of[fact.statement] = len(log.turns) + 1
            for message, reply in ((fact.statement, NOTED), *(next(filler) for _ in range(spacing))):
                text = f"{message}\n{reply}"
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                end = len(log) + len(ids)
                log.turns.append(TurnRecord(len(log.turns) + 1, len(log), len(log), end=end, text=message))
                log.append(array("i", ids))
                self._whole.add([text])
        self.turns = len(log.turns)
        self.passages = Passages(log, tokenizer)
        self.passages.update()

    def ranked(self, question: str) -> list[int]:
        """Return the `BEST` best turns by the ranking of `auto_recall`, the best one first."""
        matches = rank(question, self.passages.index)
        return list(dict.fromkeys(self.passages.all[match.passage].turn for match in matches))[:BEST]

    def bm25(self, question: str) -> list[int]:
        """Return the `BEST` best turns by BM25 over whole turns and all words of the question."""
        return [number + 1 for number, _ in self._whole.bm25(words_of(question))[:BEST]]
