"""Turns that are put back into the cache for a message: which ones, what is recorded, and what the event says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from streamchat.base import events as ev
from streamchat.conversation import auto_recall as module
from streamchat.conversation.auto_recall import Candidate
from tests.support.recall_desk import Desk
from tests.support.scripted_model import Chat, make_chat


class Counter(Desk):
    """A desk that notes what is paged in; the turns in `lost` are not archived."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)
        self.steps, self.lost = list[Any](), set[int]()
        self.cache.make_room = lambda *given: self.steps.append(given)
        monkeypatch.setattr(module, "page_in", lambda cache, kept, missing: self.steps.append((kept, missing)))
        monkeypatch.setattr(module, "kept_tokens", self._kept)
        monkeypatch.setattr(module, "cache_view", lambda cache, log: "the state")

    def _kept(self, cache: Any, missing: Any, find: Any) -> list[Any] | None:
        turns = {index // 100 + 1 for first, stop in missing for index in range(first, stop)}
        return None if turns & self.lost else [find, *missing]

    def put_back(self, *turns: int, room: int = 400) -> Any:
        found = [Candidate(self.log.turns[turn - 1], self.passages[3 * turn - 2]) for turn in turns]
        return self.recall._put_back(self.log.turns[4], found, room, "find", 0.0)  # type: ignore[arg-type]


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


def event(turns: tuple[int, ...], partly: tuple[int, ...], runs: list[tuple[int, int]]) -> Any:
    tokens = sum(stop - first for first, stop in runs)
    return ev.TurnsRecalled(5, turns, partly, tokens, tuple(runs), 0.0, "the state")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("turns", "lost", "recalled", "missing"),
    [
        ((2,), (), (2,), [(100, 200)]),
        ((3, 1), (), (1, 3), [(4, 100), (200, 300)]),
        ((2, 3), (), (2, 3), [(100, 300)]),
        ((3, 2), (3,), (2,), [(100, 200)]),
        ((4, 2), (), (2, 4), [(100, 200)]),  # turn 4 is cached
    ],
)
def test_evicted_tokens_of_the_turns_come_back(
    desk: Counter, turns: tuple[int, ...], lost: tuple[int, ...], recalled: tuple[int, ...], missing: Any
) -> None:
    desk.lost.update(lost)
    made = desk.put_back(*turns)
    assert made.seconds > 0
    assert replace(made, seconds=0.0) == event(recalled, (), missing)
    assert desk.log.turns[4].recalled == recalled
    runs = {(4, 100) if turn == 1 else (100 * turn - 100, 100 * turn) for turn in recalled}
    assert {index for run in desk.cache.recalled for index in range(*run)} == {i for run in runs for i in range(*run)}
    assert desk.steps == [(made.tokens, "page_in"), (["find", *missing], missing)]


def test_a_turn_that_comes_back_in_part_is_named(desk: Counter) -> None:
    made = desk.put_back(2, 3, room=150)
    assert (made.turns, made.partly) == ((2, 3), (3,))
    assert made.tokens <= 150
    assert desk.log.turns[4].recalled == (2, 3)


def test_turns_that_are_cached_are_not_paged_in(desk: Counter) -> None:
    made = desk.put_back(4)
    assert replace(made, seconds=0.0) == event((4,), (), [])
    assert desk.cache.recalled == ((300, 400),)
    assert desk.steps == []


@pytest.mark.parametrize(("turns", "lost", "room"), [((), (), 400), ((2, 3), (2, 3), 400), ((2,), (), 10)])
def test_nothing_comes_back(desk: Counter, turns: tuple[int, ...], lost: tuple[int, ...], room: int) -> None:
    desk.lost.update(lost)
    assert desk.put_back(*turns, room=room) is None
    assert (desk.cache.recalled, desk.log.turns[4].recalled, desk.steps) == ((), (), [])


def test_turns_that_were_wanted_come_back_whole_and_the_others_are_named(desk: Counter) -> None:
    [recalled] = desk.recall._recall_wanted(desk.log.turns[4], 10, [2, 1, 3], "find")  # type: ignore[arg-type]
    # of 400 tokens, 20 are retained, 100 stay free, and 10 are for the message
    assert (recalled.turns, recalled.partly) == ((1, 2, 3), (3,))  # type: ignore[attr-defined]
    assert 240 < recalled.tokens <= 270  # type: ignore[attr-defined]
    assert desk.updates > 0
    desk.lost.update((1, 2, 3))
    desk.log.turns[4].recalled = ()
    [notice] = desk.recall._recall_wanted(desk.log.turns[4], 10, [2], "find")  # type: ignore[arg-type]
    assert notice.text.startswith("Turn 2 could not be recalled")  # type: ignore[attr-defined]


def test_a_turn_that_was_chosen_by_its_number_has_no_excerpt(desk: Counter) -> None:
    chosen = desk.recall._first_of(2)
    assert (chosen.turn.number, chosen.passage, chosen.excerpt) == (2, desk.passages[3], "")


# --- with a model -----------------------------------------------------------------------------------------------

OTHER = "well, what do you think about it now? please tell me some more"


def talk() -> Chat:
    chat = make_chat(cache_size=192, auto_recall="on", max_new_tokens=16)
    chat.say("my locker code is 48213", "I see.")
    for _ in range(9):
        chat.say(OTHER, "I think so.")
    return chat


def test_a_turn_is_in_context_for_the_reply_to_a_message_that_matches_it() -> None:
    chat = talk()
    log, cache = chat.conversation.log, chat.conversation.cache
    first = log.turns[0]
    assert first.end is not None
    run = (first.start, first.end)
    assert not cache.ledger.count_in(*run)
    chat.say("what is my locker code?", "It is.")
    [made] = chat.of(ev.TurnsRecalled)
    tokens = first.end - first.start
    assert (made.turn, made.turns, made.partly, made.tokens, made.runs) == (11, (1,), (), tokens, (run,))
    assert made.cache.recalled == tokens
    assert {segment.turn for segment in made.cache.segments if segment.recalled} == {1}
    assert log.turns[-1].recalled == (1,)
    assert (cache.recalled, cache.ledger.count_in(*run)) == ((run,), tokens)
    chat.check()
    chat.say("and the locker code again?", "It is.")
    assert chat.of(ev.TurnsRecalled)[1].tokens == 0  # it is still cached
    chat.say(OTHER, "I think so.")
    assert not cache.ledger.count_in(*run)
    assert not cache.recalled
    newest = log.turns[-1]
    assert newest.recalled == ()
    chat.check()
