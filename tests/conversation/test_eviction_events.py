"""Events of evictions name the turns that lost tokens, and cuts split no character and no opening of a message."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from streamchat.base import events as ev
from streamchat.cache.eviction.ledger import Ledger
from streamchat.cache.eviction.options import Eviction
from streamchat.conversation.cache_view import cache_view
from streamchat.conversation.eviction_events import clean_cut, eviction_event
from streamchat.conversation.log import TokenLog, TurnRecord

HALF = "\N{REPLACEMENT CHARACTER}"


class Letters:
    """A tokenizer whose ids from 200 on continue a character."""

    def decode(self, ids: list[int], *, clean_up_tokenization_spaces: bool) -> str:
        assert not clean_up_tokenization_spaces
        return HALF if ids[0] >= 200 else f"a{HALF}"  # a character that begins in a token does not continue one


def a_log(*ids: int) -> TokenLog:
    log = TokenLog()
    log.append(ids)
    return log


@pytest.mark.parametrize(("index", "cut"), [(0, 0), (1, 4), (2, 4), (3, 4), (4, 4), (5, 5)])
def test_a_cut_is_never_inside_a_character(index: int, cut: int) -> None:
    assert clean_cut(index, a_log(1, 200, 201, 202, 5, 6), Letters()) == cut


def test_a_character_has_at_most_four_bytes_and_the_log_an_end() -> None:
    assert clean_cut(1, a_log(1, *[200] * 9), Letters()) == 5
    assert clean_cut(1, a_log(1, 200, 200), Letters()) == 3


@pytest.mark.parametrize(("index", "cut"), [(2, 2), (3, 6), (5, 6), (6, 6), (7, 7)])
def test_a_cut_is_never_inside_the_opening_of_a_message(index: int, cut: int) -> None:
    log = a_log(*range(10))
    log.turns = [TurnRecord(1, 2, 6, end=10)]
    assert clean_cut(index, log, Letters()) == cut


def a_cache(runs: list[tuple[int, int]], sinks: int = 4) -> Any:
    return SimpleNamespace(ledger=Ledger(runs, 40), num_sink_tokens=sinks)


def test_an_eviction_names_the_turns_that_lost_tokens_and_those_that_lost_all() -> None:
    log = a_log(*range(40))
    log.turns = [TurnRecord(1, 2, 3, end=12), TurnRecord(2, 12, 13, end=20), TurnRecord(3, 20, 21, end=30)]
    log.turns.append(TurnRecord(4, 30, 31))
    eviction = Eviction(((4, 12), (20, 24)), 40, 28, "decode")
    state = ev.CacheState(length=7)
    event = eviction_event(eviction, log, a_cache([(0, 4), (12, 20), (24, 40)]), state)
    assert event == ev.TokensEvicted(
        count=12,
        token_range=(4, 24),
        turns=(1, 3),
        turns_gone=(1,),  # sinks do not count
        cache_len_before=40,
        cache_len_after=28,
        trigger="decode",
        cache=state,
        runs=((4, 12), (20, 24)),
    )


def test_a_running_turn_is_never_gone() -> None:
    log = a_log(*range(40))
    log.turns = [TurnRecord(1, 4, 5)]
    event = eviction_event(Eviction(((4, 40),), 40, 4, "decode"), log, a_cache([(0, 4)]), ev.CacheState())
    assert (event.turns, event.turns_gone) == ((1,), ())


def test_a_turn_is_not_gone_while_one_of_its_tokens_is_cached() -> None:
    log = a_log(*range(40))
    log.turns = [TurnRecord(1, 4, 5, end=12)]
    for runs, gone in (([(0, 4), (11, 40)], ()), ([(0, 4), (12, 40)], (1,))):
        event = eviction_event(Eviction(((4, 11),), 40, 33, "prefill"), log, a_cache(runs), ev.CacheState())
        assert event.turns_gone == gone


def test_the_state_of_a_cache_adds_up() -> None:
    log = a_log(*range(40))
    log.turns = [TurnRecord(1, 6, 7, 9, 12), TurnRecord(2, 12, 13, 15, 20), TurnRecord(3, 20, 21, 25, 40)]
    runs = [(0, 6), (9, 12), (20, 40)]
    cache: Any = SimpleNamespace(
        cache_size=64,
        num_sink_tokens=4,
        lengths=[29, 28],  # while a forward runs, the first layers are ahead
        ledger=Ledger(runs, 40),
        pins=((0, 6),),
        recalled=((9, 12),),
        prefix=6,
        num_retained=9,
        compression_count=2,
        tokens_evicted=11,
        kv_bytes=1234,
        token_bytes=10,
    )
    state = cache_view(cache, log)
    assert (state.length, state.sinks, state.pinned, state.window, state.recalled) == (29, 4, 2, 23, 3)
    assert (state.cache_size, state.compressions, state.tokens_evicted, state.tokens_seen) == (64, 2, 11, 40)
    assert (state.kv_bytes, state.full_kv_bytes, state.first_visible_turn) == (1234, 400, 2)
    assert state.segments == (
        ev.Segment("sinks", 0, 4, 4, pinned=True),
        ev.Segment("system", 0, 2, 2, pinned=True),
        ev.Segment("assistant", 1, 3, 3, recalled=True),
        ev.Segment("user", 3, 5, 5),
        ev.Segment("assistant", 3, 15, 15),
    )
    cache.tokens_evicted = 0
    assert cache_view(cache, log).first_visible_turn == 0
    cache.lengths = []
    assert cache_view(cache, log).length == 0
