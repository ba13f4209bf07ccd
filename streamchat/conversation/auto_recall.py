"""Automatic recall: ranks the evicted turns by how well they match the newest message, and pages the best ones in.

Recalled tokens are not evicted while the reply is generated. From the next message on, they are ordinary tokens, the
oldest in the cache. They are therefore evicted first, unless they match that message as well.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError
from streamchat.base.formatting import format_turns
from streamchat.cache.eviction.policy import Run, merged_runs
from streamchat.cache.paging import can_page_in, missing_runs, page_in
from streamchat.cache.streaming import StreamingCache
from streamchat.config.settings import Settings
from streamchat.conversation.cache_view import cache_view
from streamchat.conversation.eviction_events import clean_cut
from streamchat.conversation.feeder import Feeder
from streamchat.conversation.log import TurnRecord
from streamchat.conversation.passages import Passage, Passages
from streamchat.conversation.pins import SMALLEST_WINDOW
from streamchat.conversation.recall import FindEvicted, kept_tokens
from streamchat.conversation.recall_ranking import rank
from streamchat.conversation.rollback import release_memory

_log = logging.getLogger(__name__)

MOST_TURNS = 3
"""Maximum number of turns that are recalled for one message."""
LEAST_OF_BEST = 0.5
"""A turn is recalled only if its score is at least this share of the best score."""
LEAST_TOKENS = 16
"""Minimum number of tokens of a part of a turn that is recalled."""
EXCERPT_LENGTH = 60
"""Maximum characters of an excerpt."""


@dataclass(frozen=True)
class Candidate:
    """An evicted turn that matches a message, and its best matching passage."""

    turn: TurnRecord
    passage: Passage
    text: str = ""
    """Text of the passage; '' if the turn was chosen by its number."""

    @property
    def excerpt(self) -> str:
        """The start of the passage, on one line."""
        text = " ".join(self.text.split())
        return text if len(text) <= EXCERPT_LENGTH else text[: EXCERPT_LENGTH - 1].rstrip() + "…"


@dataclass(frozen=True)
class _Part:
    """The part of a turn that is recalled."""

    turn: int
    run: Run
    is_whole: bool


class AutoRecall:
    """Recalls evicted turns of one conversation.

    Args:
        feeder: Provides the cache and the log.
        tokenizer: Decodes the ids of the log.
    """

    def __init__(self, feeder: Feeder, tokenizer: Any) -> None:
        self._feeder, self._cache, self._log, self._tokenizer = feeder, feeder.cache, feeder.log, tokenizer
        self._passages = Passages(feeder.log, tokenizer)

    def before_reply(
        self, turn: TurnRecord, prompt_tokens: int, settings: Settings, wanted: Sequence[int], find: FindEvicted
    ) -> Sequence[ev.Event]:
        """Recall or suggest turns for the message of `turn`, as the settings say, and return the resulting events.

        If this fails, the error is logged, and the reply is generated without a recall.

        Args:
            turn: The running turn, the newest of the log; none of its tokens has been prefilled.
            prompt_tokens: Length of its prompt, in tokens.
            settings: The current settings.
            wanted: Numbers of the turns that the user asked for. If empty, the turns are ranked if the settings say so.
            find: Finds evicted tokens that are not in the cache's history.
        """
        cache = self._cache
        recent, cache.recalled = cache.recalled, ()
        try:
            if wanted:
                return self._recall_wanted(turn, prompt_tokens, wanted, find)
            event: ev.Event | None = None
            if settings.auto_recall == "on":
                event = self._recall(turn, prompt_tokens, settings.recall_share, recent, find)
            elif settings.auto_recall == "suggest":
                event = self._suggest(turn)
            return () if event is None else (event,)
        except Exception:
            _log.exception("recalling turns for turn %d failed", turn.number)
            turn.recalled, cache.recalled = (), ()
            if set(cache.lengths) != {cache.length}:  # only some layers have the paged-in tokens
                release_memory(self._feeder.device)
                self._feeder.prefill_runs(cache.ledger.runs, len(self._log))
            return (_not_recalled(wanted),) if wanted else ()

    def prepare(self, settings: Settings) -> None:
        """Index the finished turns unless `auto_recall` is off. Called between turns, so that no reply waits for it."""
        if settings.auto_recall != "off":
            try:
                self._passages.update()
            except Exception:
                _log.exception("indexing the newest turn failed")

    def candidates(self, message: str, recent: Sequence[Run] = ()) -> list[Candidate]:
        """Return the evicted turns that match `message`, at most `MOST_TURNS`, the best one first.

        Args:
            message: The message that they are to match.
            recent: Runs of log indices that count as evicted although they are cached.
        """
        if not can_page_in(self._cache) or not self._cache.tokens_evicted:
            return []
        self._passages.update()
        found: dict[int, Candidate] = {}
        best = 0.0
        for match in rank(message, self._passages.index):
            passage = self._passages.all[match.passage]
            if match.score < LEAST_OF_BEST * best or len(found) == MOST_TURNS:
                break
            if passage.turn in found or not self._is_evicted(passage, recent):
                continue
            best = best or match.score
            found[passage.turn] = Candidate(self._log.turns[passage.turn - 1], passage, self._passages.text_of(passage))
        return list(found.values())

    def _is_evicted(self, passage: Passage, recent: Sequence[Run]) -> bool:
        first, stop = max(passage.first, self._cache.num_sink_tokens), passage.stop
        is_missing = self._cache.ledger.count_in(first, stop) < stop - first
        return is_missing or any(first < b and a < stop for a, b in recent)

    def _suggest(self, turn: TurnRecord) -> ev.RecallSuggested | None:
        found = self.candidates(turn.text)
        numbers, excerpts = tuple(each.turn.number for each in found), tuple(each.excerpt for each in found)
        return ev.RecallSuggested(turn.number, numbers, excerpts) if found else None

    def _recall(
        self, turn: TurnRecord, prompt_tokens: int, share: float, recent: Sequence[Run], find: FindEvicted
    ) -> ev.TurnsRecalled | None:
        started = time.perf_counter()
        room = self._room(prompt_tokens, share)
        return self._put_back(turn, self.candidates(turn.text, recent), room, find, started)

    def _recall_wanted(
        self, turn: TurnRecord, prompt_tokens: int, wanted: Sequence[int], find: FindEvicted
    ) -> list[ev.Event]:
        started = time.perf_counter()
        self._passages.update()
        matches = {candidate.turn.number: candidate for candidate in self.candidates(turn.text)}
        found = [matches.get(number) or self._first_of(number) for number in wanted]
        event = self._put_back(turn, found, self._room(prompt_tokens, 1.0), find, started)
        left = [number for number in wanted if number not in turn.recalled]
        return [*([] if event is None else [event]), *([_not_recalled(left)] if left else [])]

    def require_evicted(self, wanted: Sequence[int]) -> None:
        """Raise an error if one of the turns cannot be recalled for a new reply to the newest message.

        The newest turn is undone before the new reply. A turn that is cached only because it was recalled for the
        newest turn, or paged in after that started, can therefore be recalled again.

        Raises:
            ConfigError: A turn does not exist or is in context already, or tokens cannot be paged in.
        """
        if wanted and not can_page_in(self._cache):
            raise ConfigError("tokens cannot be paged into this model's cache")
        before = self._log.turns[-1].before if self._log.turns else None
        for number in wanted:
            if not 1 <= number < len(self._log.turns):
                newest = len(self._log.turns)
                raise ConfigError(f"turn {number} cannot be recalled; choose one before turn {newest}, the newest")
            run = _run_of(self._log.turns[number - 1], self._cache)
            is_cached = not missing_runs(self._cache, [run])
            if is_cached and (before is None or any(a <= run[0] and run[1] <= b for a, b in before.cache.held)):
                raise ConfigError(f"turn {number} is in context already; /pin {number} retains it")

    def _first_of(self, number: int) -> Candidate:
        turn = self._log.turns[number - 1]
        return Candidate(turn, self._passages.all.first_of(number))

    def _room(self, prompt_tokens: int, share: float) -> int:
        """Return the maximum number of tokens to recall; at least a quarter of the cache stays for the conversation."""
        cache = self._cache
        quarter = max(SMALLEST_WINDOW, cache.cache_size // 4)
        free = cache.cache_size - cache.num_retained - quarter - min(prompt_tokens, quarter)
        return max(0, min(int(share * cache.cache_size), free))

    def _put_back(
        self, turn: TurnRecord, found: Sequence[Candidate], room: int, find: FindEvicted, started: float
    ) -> ev.TurnsRecalled | None:
        """Page in as much of the turns `found` as fits into `room` tokens; return None if nothing fits."""
        cache = self._cache
        parts = self._parts_of(found, room)
        kept = kept_tokens(cache, missing_runs(cache, _runs(parts)), find)
        if kept is None:  # some turn is not archived
            parts = [part for part in parts if kept_tokens(cache, missing_runs(cache, [part.run]), find) is not None]
            kept = kept_tokens(cache, missing_runs(cache, _runs(parts)), find)
        if not parts or kept is None:
            return None
        cache.recalled = tuple(_runs(parts))
        missing = missing_runs(cache, cache.recalled)
        tokens = sum(stop - first for first, stop in missing)
        if missing:
            cache.make_room(tokens, "page_in")
            page_in(cache, kept, missing)
        turn.recalled = tuple(sorted(part.turn for part in parts))
        partly = tuple(sorted(part.turn for part in parts if not part.is_whole))
        seconds, state = time.perf_counter() - started, cache_view(cache, self._log)
        return ev.TurnsRecalled(turn.number, turn.recalled, partly, tokens, tuple(missing), seconds, state)

    def _parts_of(self, found: Sequence[Candidate], room: int) -> list[_Part]:
        parts = list[_Part]()
        for candidate in found:
            part = self._part_of(candidate, room)
            if part is not None:
                parts.append(part)
                room -= part.run[1] - part.run[0]
        return parts

    def _part_of(self, candidate: Candidate, room: int) -> _Part | None:
        """Return the turn if it fits into `room` tokens, else a part around its passage; None if that is too short."""
        first, stop = _run_of(candidate.turn, self._cache)
        if stop - first <= room:
            return _Part(candidate.turn.number, (first, stop), True)
        a, b = max(first, candidate.passage.first), candidate.passage.stop
        if b - a > room:
            b = self._clean(a + room - 4, b)
        else:
            a = self._clean(max(first, a - (room - (b - a)) // 2), a)
            b = self._clean(min(stop, a + room - 4), stop) if a + room - 4 > b else b
        return _Part(candidate.turn.number, (a, b), False) if b - a >= LEAST_TOKENS else None

    def _clean(self, index: int, most: int) -> int:
        """Return the first log index at or after `index` at which the text can be cut, but at most `most`."""
        return min(most, clean_cut(index, self._log, self._tokenizer))


def _not_recalled(turns: Sequence[int]) -> ev.Notice:
    """Return the notice that `turns`, which the user asked for, could not be recalled."""
    their, them = ("its", "it") if len(turns) == 1 else ("their", "them")
    why = f"{their} keys and values are not archived, or there is no room for {them}"
    return ev.Notice(f"{format_turns(turns).capitalize()} could not be recalled: {why}.", "warning")


def _run_of(turn: TurnRecord, cache: StreamingCache) -> Run:
    assert turn.end is not None
    return max(turn.start, cache.num_sink_tokens), turn.end


def _runs(parts: Sequence[_Part]) -> list[Run]:
    return merged_runs(part.run for part in parts)
