"""Recall on a stand-in for cache and log, whose turns have round numbers of tokens."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from streamchat.cache.eviction.ledger import Ledger
from streamchat.cache.eviction.policy import Run
from streamchat.conversation import auto_recall as module
from streamchat.conversation.auto_recall import AutoRecall
from streamchat.conversation.log import TokenLog, TurnRecord
from streamchat.conversation.passages import Passage, PassageList
from streamchat.conversation.recall_ranking import Match


class Letters:
    """A tokenizer whose ids from 200 on continue a character."""

    def decode(self, ids: list[int], **options: Any) -> str:
        return "\N{REPLACEMENT CHARACTER}" if ids[0] >= 200 else "a"


class Desk:
    """Recall on a stand-in: turn n has the log indices 100 (n - 1) to 100 n - 1; sinks and turns 4 and 5 are cached."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, turns: int = 5) -> None:
        self.log = TokenLog(array("i", [1] * 100 * turns))
        self.log.turns = [
            TurnRecord(n, 100 * n - 100, 100 * n - 99, end=100 * n, text=f"m{n}") for n in range(1, turns + 1)
        ]
        self.cache: Any = SimpleNamespace(
            cache_size=400,
            num_sink_tokens=4,
            num_retained=20,
            ledger=Ledger([(0, 4), (300, 100 * turns)], 100 * turns),
            tokens_evicted=296,
            croppable=True,
            recalled=(),
            lengths=[204],
            length=204,
        )
        feeder: Any = SimpleNamespace(cache=self.cache, log=self.log, device="cpu")
        self.recall = AutoRecall(feeder, Letters())
        self.passages = [
            Passage(turn, 100 * (turn - 1) + at, 100 * (turn - 1) + at + 30)
            for turn in range(1, turns + 1)
            for at in (0, 30, 60)
        ]
        self.updates = 0
        listed = PassageList()
        for passage in self.passages:
            listed.append(passage)
        self.recall._passages = SimpleNamespace(  # type: ignore[assignment]
            all=listed, index="the index", update=self._update, text_of=self._text_of
        )
        self.matches: list[Match] = []
        self.asked: list[Any] = []
        monkeypatch.setattr(module, "rank", self._rank)

    def _rank(self, *given: Any) -> list[Match]:
        self.asked.append(given)
        return self.matches

    @staticmethod
    def _text_of(passage: Passage) -> str:
        return f"passage {passage.turn} {passage.first - 100 * (passage.turn - 1)}"

    def _update(self) -> None:
        self.updates += 1

    def candidates(self, *scores: tuple[int, int, float], recent: Sequence[Run] = ()) -> list[tuple[int, int]]:
        """(turn, index of its passage) of the candidates, if passages score so: (turn, index of passage, score)."""
        self.matches = [Match(3 * (turn - 1) + at, score) for turn, at, score in scores]
        found = self.recall.candidates("message", recent)
        assert all(each.turn is self.log.turns[each.turn.number - 1] for each in found)
        return [(each.turn.number, self.passages.index(each.passage) % 3) for each in found]
