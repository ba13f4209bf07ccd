"""Which evicted turns come back, which part of them, in how much room, and what a refusal leaves unchanged."""

from __future__ import annotations

from array import array
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from streamchat.base import events as ev
from streamchat.base.errors import CacheError, ConfigError
from streamchat.cache.evicted import EvictedTokens
from streamchat.cache.eviction.ledger import Ledger
from streamchat.cache.layers.slots import CopiedStates
from streamchat.conversation import auto_recall as module
from streamchat.conversation import recall
from streamchat.conversation.auto_recall import Candidate, _not_recalled, _Part
from streamchat.conversation.passages import Passage
from streamchat.conversation.recall import kept_tokens, page_in_turn
from streamchat.conversation.recall_ranking import Match
from tests.support.recall_desk import Desk
from tests.support.scripted_model import Chat, make_chat


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(monkeypatch)


# --- candidates -----------------------------------------------------------------------------------------------------


def test_the_best_passage_of_each_evicted_turn_is_a_candidate(desk: Desk) -> None:
    scores = [(2, 1, 9.0), (2, 0, 8.0), (4, 0, 8.0), (1, 2, 7.0)]
    assert desk.candidates(*scores) == [(2, 1), (1, 2)]  # turn 4 is cached
    assert (desk.updates, desk.asked) == (1, [("message", "the index")])


def test_a_candidate_has_at_least_half_of_the_best_score_of_an_evicted_turn(desk: Desk) -> None:
    assert desk.candidates((4, 0, 100.0), (2, 1, 8.0), (1, 0, 4.0), (3, 0, 3.99)) == [(2, 1), (1, 0)]


def test_there_are_at_most_three_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch, turns=7)
    desk.cache.ledger = Ledger([(0, 4), (600, 700)], 700)
    scores = [(turn, 0, 9.0) for turn in (1, 2, 3, 4, 5)]
    assert desk.candidates(*scores) == [(1, 0), (2, 0), (3, 0)]


def test_a_turn_that_is_partly_cached_is_a_candidate_by_its_evicted_passage(desk: Desk) -> None:
    desk.cache.ledger = Ledger([(0, 4), (129, 500)], 500)
    assert desk.candidates((2, 1, 9.0), (2, 0, 8.0)) == [(2, 0)]  # one token of that passage is missing
    desk.cache.ledger = Ledger([(0, 30), (100, 500)], 500)
    assert desk.candidates((1, 0, 9.0)) == []
    desk.cache.ledger = Ledger([(4, 30), (100, 500)], 500)
    assert desk.candidates((1, 0, 9.0)) == []  # sinks do not count


def test_recalled_turns_count_as_evicted(desk: Desk) -> None:
    scores = [(4, 1, 9.0)]
    assert desk.candidates(*scores, recent=[(330, 331)]) == [(4, 1)]
    assert desk.candidates(*scores, recent=[(359, 400)]) == [(4, 1)]
    assert desk.candidates(*scores, recent=[(300, 330), (360, 400)]) == []


def test_nothing_is_ranked_while_nothing_is_evicted_or_nothing_can_come_back(desk: Desk) -> None:
    desk.cache.tokens_evicted = 0
    assert desk.candidates((2, 1, 9.0)) == []
    desk.cache.tokens_evicted, desk.cache.croppable = 1, False
    assert desk.candidates((2, 1, 9.0)) == []
    assert (desk.updates, desk.asked) == (0, [])


@pytest.mark.parametrize(
    ("text", "excerpt"),
    [("a\n b  c", "a b c"), ("x" * 60, "x" * 60), ("x" * 61, "x" * 59 + "…"), ("x" * 58 + " yyy", "x" * 58 + "…")],
)
def test_an_excerpt_is_one_short_line(desk: Desk, text: str, excerpt: str) -> None:
    assert Candidate(desk.log.turns[0], Passage(1, 0, 30), text).excerpt == excerpt


def test_suggestions_name_turns_and_excerpts(desk: Desk) -> None:
    assert desk.recall._suggest(desk.log.turns[4]) is None
    desk.matches = [Match(4, 9.0), Match(0, 8.0)]
    expected = ev.RecallSuggested(5, (2, 1), ("passage 2 30", "passage 1 0"))
    assert desk.recall._suggest(desk.log.turns[4]) == expected
    assert desk.asked[-1][0] == "m5"


def test_the_index_follows_the_turns_between_them_only_if_it_is_needed(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for setting, updates in (("off", 0), ("on", 1), ("suggest", 2)):
        desk.recall.prepare(SimpleNamespace(auto_recall=setting))  # type: ignore[arg-type]
        assert desk.updates == updates
    monkeypatch.setattr(desk.recall._passages, "update", lambda: 1 / 0)
    desk.recall.prepare(SimpleNamespace(auto_recall="on"))  # type: ignore[arg-type]
    assert "indexing the newest turn failed" in caplog.text


# --- room and parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "retained", "prompt", "share", "room"),
    [
        (400, 20, 10, 1.0, 400 - 20 - 100 - 10),
        (400, 20, 10, 0.25, 100),
        (400, 20, 99, 1.0, 181),
        (400, 20, 500, 1.0, 180),  # a long prompt takes at most a quarter
        (400, 300, 10, 1.0, 0),
        (24, 4, 8, 1.0, 24 - 4 - 8 - 8),  # the smallest window is 8
        (32, 4, 2, 1.0, 32 - 4 - 8 - 2),
        (401, 0, 0, 0.1, 40),
    ],
)
def test_a_quarter_of_the_cache_stays_for_the_conversation(
    desk: Desk, size: int, retained: int, prompt: int, share: float, room: int
) -> None:
    desk.cache.cache_size, desk.cache.num_retained = size, retained
    assert desk.recall._room(prompt, share) == room


@pytest.mark.parametrize(
    ("passage", "room", "expected"),
    [
        ((150, 180), 100, ((100, 200), True)),
        ((150, 180), 99, None),
        ((150, 180), 30, ((150, 180), False)),
        ((150, 180), 40, ((145, 181), False)),  # 5 more before it; a cut may move by up to 4 tokens
        ((150, 180), 60, ((135, 191), False)),
        ((100, 130), 60, ((100, 156), False)),
        ((170, 200), 60, ((155, 200), False)),
        ((150, 180), 29, ((150, 175), False)),
        ((150, 180), 20, ((150, 166), False)),
        ((150, 180), 19, None),  # fewer than 16 tokens
        ((150, 180), 0, None),
    ],
)
def test_of_a_turn_that_does_not_fit_the_part_around_its_passage_comes_back(
    desk: Desk, passage: tuple[int, int], room: int, expected: Any
) -> None:
    part = desk.recall._part_of(Candidate(desk.log.turns[1], Passage(2, *passage)), room)
    if room == 99:  # the whole turn needs 100
        assert part is not None
        assert not part.is_whole
        assert 150 - 34 <= part.run[0] <= 150
        assert part.run[1] - part.run[0] <= 99
        return
    assert part == (None if expected is None else _Part(2, *expected))


def test_parts_begin_and_end_between_characters(desk: Desk) -> None:
    desk.log.ids[144:147] = array("i", [200] * 3)
    part = desk.recall._part_of(Candidate(desk.log.turns[1], Passage(2, 150, 180)), 40)
    assert part == _Part(2, (147, 183), False)
    desk.log.ids[183:185] = array("i", [200] * 2)
    part = desk.recall._part_of(Candidate(desk.log.turns[1], Passage(2, 150, 180)), 40)
    assert part == _Part(2, (147, 185), False)


def test_the_first_turn_comes_back_without_its_sinks(desk: Desk) -> None:
    candidate = Candidate(desk.log.turns[0], Passage(1, 0, 30))
    assert desk.recall._part_of(candidate, 96) == _Part(1, (4, 100), True)
    assert desk.recall._part_of(candidate, 26) == _Part(1, (4, 30), False)


def test_what_one_turn_takes_is_not_there_for_the_next(desk: Desk) -> None:
    found = [Candidate(desk.log.turns[n - 1], Passage(n, 100 * n - 50, 100 * n - 20)) for n in (2, 3, 1)]
    assert desk.recall._parts_of(found, 230) == [
        _Part(2, (100, 200), True),
        _Part(3, (200, 300), True),
        _Part(1, (50, 80), False),
    ]
    assert desk.recall._parts_of(found, 100) == [_Part(2, (100, 200), True)]
    assert desk.recall._parts_of([], 100) == []


# --- refusals -------------------------------------------------------------------------------------------------------


def test_turns_that_cannot_be_recalled_are_refused(desk: Desk) -> None:
    desk.recall.require_evicted([1, 2, 3])
    desk.recall.require_evicted([])
    for number in (0, 5, 6):
        with pytest.raises(
            ConfigError, match=f"turn {number} cannot be recalled; choose one before turn 5, the newest"
        ):
            desk.recall.require_evicted([number])
    with pytest.raises(ConfigError, match="turn 4 is in context already; /pin 4 retains it"):
        desk.recall.require_evicted([2, 4])
    desk.cache.croppable = False
    desk.recall.require_evicted([])
    with pytest.raises(ConfigError, match="tokens cannot be paged into this model's cache"):
        desk.recall.require_evicted([2])


@pytest.mark.parametrize(
    ("held", "is_refused"), [(((0, 4),), False), (((300, 400),), True), (((299, 500),), True), (((301, 500),), False)]
)
def test_a_turn_that_was_recalled_for_the_newest_one_can_be_recalled_again(
    desk: Desk, held: Any, is_refused: bool
) -> None:
    desk.log.turns[-1].before = SimpleNamespace(cache=SimpleNamespace(held=held))  # type: ignore[assignment]
    if is_refused:
        with pytest.raises(ConfigError, match="turn 4 is in context already"):
            desk.recall.require_evicted([4])
    else:
        desk.recall.require_evicted([4])


def test_what_was_wanted_and_did_not_fit_is_said() -> None:
    assert _not_recalled([3]) == ev.Notice(
        "Turn 3 could not be recalled: its keys and values are not archived, or there is no room for it.", "warning"
    )
    assert _not_recalled([3, 4]).text.endswith(
        "could not be recalled: their keys and values are not archived, or there is no room for them."
    )


def test_a_failure_costs_the_recalled_turns_only(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("anything")

    feeder: Any = desk.recall._feeder
    prefilled: list[Any] = []
    feeder.prefill_runs = lambda *given: prefilled.append(given)
    monkeypatch.setattr(desk.recall, "_recall", fail)
    monkeypatch.setattr(desk.recall, "_recall_wanted", fail)
    monkeypatch.setattr(module, "release_memory", lambda device: prefilled.append(device))
    settings: Any = SimpleNamespace(auto_recall="on", recall_share=0.5)
    turn = desk.log.turns[4]
    turn.recalled = (1,)
    assert desk.recall.before_reply(turn, 10, settings, (), lambda wanted: ()) == ()
    left: Any = turn.recalled, desk.cache.recalled, prefilled
    assert left == ((), (), [])
    assert "recalling turns for turn 5 failed" in caplog.text
    desk.cache.lengths = [204, 210]
    assert desk.recall.before_reply(turn, 10, settings, [2], lambda wanted: ()) == (_not_recalled([2]),)
    assert prefilled == ["cpu", (desk.cache.ledger.runs, 500)]


@pytest.mark.parametrize(("setting", "called"), [("on", ["_recall"]), ("suggest", ["_suggest"]), ("off", [])])
def test_the_setting_decides(desk: Desk, monkeypatch: pytest.MonkeyPatch, setting: str, called: list[str]) -> None:
    calls: list[Any] = []

    def noted(name: str, *given: Any) -> list[str]:
        calls.append((name, given))
        return [name]

    for name in ("_recall", "_suggest", "_recall_wanted"):
        monkeypatch.setattr(desk.recall, name, partial(noted, name))
    desk.cache.recalled = ((300, 310),)
    settings: Any = SimpleNamespace(auto_recall=setting, recall_share=0.5)
    turn, find = desk.log.turns[4], lambda wanted: ()
    found: Any = desk.recall.before_reply(turn, 10, settings, (), find)
    assert found == tuple([name] for name in called)
    assert [name for name, _ in calls] == called
    if setting == "on":
        assert calls[0][1] == (turn, 10, 0.5, ((300, 310),), find)
    assert desk.cache.recalled == ()
    calls.clear()
    found = desk.recall.before_reply(turn, 10, settings, [2], find)
    assert found == ["_recall_wanted"]
    assert calls == [("_recall_wanted", (turn, 10, [2], find))]


# --- paging in ------------------------------------------------------------------------------------------------------


def some(*runs: tuple[int, int]) -> EvictedTokens:
    return EvictedTokens(runs, CopiedStates(), CopiedStates(), 0)


def test_tokens_in_memory_are_enough_if_they_are_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    recent, archived = [some((10, 20)), some((30, 40))], some((20, 30))
    monkeypatch.setattr(recall, "evicted_by", lambda step: step)
    cache: Any = SimpleNamespace(history=SimpleNamespace(since=lambda mark: [None, *recent] if mark == 0 else []))
    asked: list[Any] = []

    def find(wanted: Any) -> list[EvictedTokens]:
        asked.append(wanted)
        return [archived]

    assert kept_tokens(cache, [(12, 20), (30, 31)], find) == recent
    assert kept_tokens(cache, [], find) == recent
    assert asked == []
    assert kept_tokens(cache, [(12, 21)], find) == [archived, *recent]
    assert asked == [[(12, 21)]]
    assert kept_tokens(cache, [(39, 41)], find) is None
    cache.history = None
    assert kept_tokens(cache, [(20, 30)], find) == [archived]
    assert kept_tokens(cache, [(19, 30)], find) is None


def talk(turns: int = 8, **settings: Any) -> Chat:
    chat = make_chat(**({"cache_size": 128, "max_new_tokens": 16} | settings))
    for number in range(turns):
        chat.say(f"question {number}", f"the answer {number}")
    return chat


def nothing(wanted: Any) -> list[EvictedTokens]:
    return []


def facts(chat: Chat) -> tuple[Any, ...]:
    cache = chat.conversation.cache
    return list(cache.ledger.runs), cache.pins, cache.recalled, cache.length


def test_an_evicted_turn_comes_back_pinned() -> None:
    chat = talk()
    cache: Any = chat.conversation.cache
    log = chat.conversation.log
    turn = log.turns[1]
    assert turn.end is not None
    assert not cache.ledger.count_in(turn.start, turn.end)
    cache.recalled = ((turn.start, turn.end),)
    paged = page_in_turn(cache, log, 2, nothing)
    assert paged.tokens == turn.end - turn.start == cache.ledger.count_in(turn.start, turn.end)
    assert 0 < paged.seconds < 1000
    assert (turn.start, turn.end) in cache.pins or any(a <= turn.start and turn.end <= b for a, b in cache.pins)
    assert cache.recalled == ()
    chat.say("and now?", "yes")
    assert cache.ledger.count_in(turn.start, turn.end) == paged.tokens


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (0, "turn 0 does not exist; the conversation has 8"),
        (9, "turn 9 does not exist; the conversation has 8"),
        (8, "turn 8 is in context already; /pin 8 retains it"),
    ],
)
def test_a_turn_that_cannot_be_paged_in_changes_nothing(number: int, reason: str) -> None:
    chat = talk()
    before = facts(chat)
    with pytest.raises(ConfigError, match=reason):
        page_in_turn(chat.conversation.cache, chat.conversation.log, number, nothing)
    assert facts(chat) == before


def test_a_turn_that_is_not_archived_or_has_no_room_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = talk()
    cache, log, before = chat.conversation.cache, chat.conversation.log, facts(chat)

    def full(count: int, why: str) -> None:
        assert (count, why) == (log.turns[1].end - log.turns[1].start, "page_in")  # type: ignore[operator]
        raise CacheError("no room is left")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "make_room", full)
        with pytest.raises(ConfigError, match="turn 2 cannot be paged in: no room is left"):
            page_in_turn(cache, log, 2, nothing)
    assert facts(chat) == before
    assert cache.history is not None
    cache.history.clear()
    with pytest.raises(ConfigError, match="the keys and values of turn 2 are not archived"):
        page_in_turn(cache, log, 2, nothing)
    assert facts(chat) == before


def test_a_turn_that_would_fill_the_cache_is_refused() -> None:
    chat = talk(1)
    chat.say("a long question, " * 8, "short")
    for number in range(4):
        chat.say(f"question {number}", f"the answer {number}")
    chat.conversation.set_pin(6, True)
    chat.conversation.set_pin(5, True)
    before = facts(chat)
    with pytest.raises(ConfigError, match=r"^paging in turn 2 \(\d+ tokens\) would leave"):
        page_in_turn(chat.conversation.cache, chat.conversation.log, 2, nothing)
    assert facts(chat) == before


def test_a_model_that_reads_again_cannot_page_in() -> None:
    chat = talk(family="gpt2")
    with pytest.raises(ConfigError, match="tokens cannot be paged into this model's cache"):
        page_in_turn(chat.conversation.cache, chat.conversation.log, 1, nothing)
