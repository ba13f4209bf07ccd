"""Splits the finished turns of a conversation into passages of a few sentences, and indexes their words.

If only one sentence of a long turn matters, the whole turn would neither rank well nor leave room for the conversation.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from streamchat.cache.eviction.policy import Run
from streamchat.conversation.log import TokenLog, TurnRecord
from streamchat.store.passages import PassageIndex

SHORT, LONG = 24, 40
"""The next passage starts at the first end of a sentence after `SHORT` tokens, at the latest after `LONG` tokens."""
OVERLAP = 12
"""Tokens that a passage shares with the next one, so that a sentence at the border is complete in one of them."""
_ENDS = (".", "!", "?", ":", ";", "\n", "。", "！", "？")


@dataclass(frozen=True)
class Passage:
    """A part of a turn."""

    turn: int
    first: int
    """Log index of its first token."""
    stop: int

    @property
    def run(self) -> Run:
        """Its log indices."""
        return self.first, self.stop


class PassageList:
    """Passages in arrays: a long conversation has hundreds of thousands."""

    def __init__(self) -> None:
        self._turns, self._runs = array("q"), array("q")

    def __len__(self) -> int:
        return len(self._turns)

    def __getitem__(self, number: int) -> Passage:
        return Passage(self._turns[number], self._runs[2 * number], self._runs[2 * number + 1])

    def __iter__(self) -> Iterator[Passage]:
        return map(self.__getitem__, range(len(self)))

    def append(self, passage: Passage) -> None:
        """Add a passage, of the same turn as the last one or a later turn."""
        self._turns.append(passage.turn)
        self._runs.extend(passage.run)

    def cut(self, count: int) -> None:
        """Remove all passages from number `count` on."""
        del self._turns[count:], self._runs[2 * count :]

    def first_of(self, turn: int) -> Passage:
        """Return the first passage of an indexed turn."""
        return self[bisect_left(self._turns, turn)]


class Passages:
    """The passages of the finished turns of `log`, and the index of their words.

    Args:
        log: The log; `update` follows it.
        tokenizer: Decodes its ids.
    """

    def __init__(self, log: TokenLog, tokenizer: Any) -> None:
        self._log, self._tokenizer = log, tokenizer
        self._turns: list[TurnRecord] = []
        """The turns that are indexed, oldest first."""
        self._counts: list[int] = []
        """Number of passages up to and including each of them."""
        self.all = PassageList()
        self.index = PassageIndex()
        self._is_end: dict[int, bool] = {}

    def update(self) -> None:
        """Drop the passages of undone turns, and add those of new ones."""
        turns = self._log.turns
        while self._turns and (len(self._turns) > len(turns) or self._turns[-1] is not turns[len(self._turns) - 1]):
            del self._turns[-1], self._counts[-1]
        count = self._counts[-1] if self._counts else 0
        if count < len(self.all):
            self.all.cut(count)
            self.index.cut(count)
        new: list[str] = []
        for turn in turns[len(self._turns) :]:
            if turn.end is None:
                break
            for passage in self._passages_of(turn):
                self.all.append(passage)
                new.append(self.text_of(passage))
            self._turns.append(turn)
            self._counts.append(count + len(new))
        if new:
            self.index.add(new)

    def _passages_of(self, turn: TurnRecord) -> Iterator[Passage]:
        assert turn.end is not None
        first = turn.start
        while first < turn.end:
            next_first = self._end_of(first, turn.end)
            stop = min(next_first + OVERLAP, turn.end)
            yield Passage(turn.number, first, stop)
            first = next_first

    def text_of(self, passage: Passage) -> str:
        """Return the text of a passage, without the role names of the template."""
        turn, (first, stop) = self._log.turns[passage.turn - 1], passage.run
        reply = stop if turn.reply_start is None else turn.reply_start
        runs = ((max(first, turn.message_start), min(stop, reply)), (max(first, reply + self._opening_of(turn)), stop))
        parts = (self._log.ids[a:b].tolist() for a, b in runs if a < b)
        return "\n".join(
            self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in parts
        )

    def _opening_of(self, turn: TurnRecord) -> int:
        """Return the number of tokens before the text of a reply; for a resumed turn, that of the newest other one."""
        for each in (turn, *reversed(self._log.turns)):
            if each.prompt_end is not None and each.reply_start is not None:
                return each.prompt_end - each.reply_start
        return 0

    def _end_of(self, first: int, end: int) -> int:
        if end - first <= LONG + OVERLAP:  # otherwise, the last passage could have only a few tokens
            return end
        for at in range(first + SHORT, first + LONG):
            if self._ends_sentence(self._log.ids[at - 1]):
                return at
        return first + LONG

    def _ends_sentence(self, token: int) -> bool:
        if token not in self._is_end:
            text: str = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
            self._is_end[token] = text.rstrip(" ").endswith(_ENDS)
        return self._is_end[token]
