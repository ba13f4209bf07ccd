"""Pins on a cache without a model: what they retain, what they return, and where their limits are."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from streamchat.base.errors import ConfigError
from streamchat.conversation.log import TokenLog, TurnRecord
from streamchat.conversation.pins import is_pinned, pinned_turns, require_free_window, require_window, set_pin
from tests.support.bare_cache import fed

SINKS = 4


def turns(*edges: int) -> TokenLog:
    """A log with turns between these log indices; the last one runs if its end is -1."""
    log = TokenLog()
    log.append([0] * max(edges))
    log.turns = [
        TurnRecord(number + 1, first, first, end=None if stop < 0 else stop)
        for number, (first, stop) in enumerate(pairwise(edges))
    ]
    return log


@pytest.mark.parametrize(
    ("pins", "pinned"),
    [
        ([], []),
        ([(4, 10)], [1]),  # the sinks of the first turn need no pin
        ([(5, 10)], []),
        ([(4, 9)], []),
        ([(4, 20)], [1, 2]),
        ([(9, 31)], [2, 3]),
        ([(4, 10), (20, 30)], [1, 3]),
        ([(10, 15), (15, 20)], []),  # a turn is pinned by one run
        ([(0, 100)], [1, 2, 3]),  # a running turn is never pinned
    ],
)
def test_a_turn_is_pinned_if_one_run_has_all_of_it_but_sinks(pins: list[tuple[int, int]], pinned: list[int]) -> None:
    log = turns(0, 10, 20, 30, -1)
    assert [turn.number for turn in log.turns if is_pinned(turn, pins, SINKS)] == pinned
    assert [turn.number for turn in pinned_turns(log, pins, SINKS)] == pinned


def test_pinning_returns_the_cached_tokens_of_a_turn_and_unpinning_as_well() -> None:
    cache, log = fed(64, SINKS, 30).cache, turns(0, 10, 20, 30)
    assert [set_pin(cache, log, number, True) for number in (1, 3)] == [6, 10]
    assert list(cache.pins) == [(4, 10), (20, 30)]
    assert set_pin(cache, log, 1, False) == 6
    assert list(cache.pins) == [(20, 30)]
    partly = fed(24, 0, 30).cache  # the oldest 6 tokens are evicted
    assert set_pin(partly, log, 1, True) == 4
    assert partly.pins == ((0, 10),)


@pytest.mark.parametrize(
    ("number", "pinned", "message"),
    [
        (0, True, "turn 0 does not exist; the conversation has 3"),
        (4, False, "turn 4 does not exist; the conversation has 3"),
        (2, False, "turn 2 is not pinned"),
        (3, True, "turn 3 is already pinned"),
        (1, True, "turn 1 cannot be pinned: it was evicted from the cache"),
    ],
)
def test_what_cannot_be_pinned_or_unpinned(number: int, pinned: bool, message: str) -> None:
    cache, log = fed(32, SINKS, 38).cache, turns(0, 10, 20, 38)
    cache.pins = ((20, 38),)
    with pytest.raises(ConfigError) as error:
        set_pin(cache, log, number, pinned)
    assert str(error.value) == message
    assert cache.pins == ((20, 38),)
    with pytest.raises(ConfigError, match=r"^turn 1 does not exist; the conversation is empty$"):
        set_pin(cache, TokenLog(), 1, True)


@pytest.mark.parametrize(("size", "least"), [(24, 8), (32, 8), (36, 9), (48, 12)])
def test_at_least_8_tokens_and_a_quarter_of_the_cache_stay_unpinned(size: int, least: int) -> None:
    most = size - SINKS - least
    for tokens in (most, most + 1):
        cache, log = fed(size, SINKS, SINKS + tokens).cache, turns(SINKS, SINKS + tokens)
        if tokens == most:
            assert set_pin(cache, log, 1, True) == tokens
            continue
        with pytest.raises(ConfigError) as error:
            set_pin(cache, log, 1, True)
        assert str(error.value).startswith(
            f"pinning turn 1 ({tokens} tokens) would leave {least - 1} of {size} tokens for the conversation, "
            f"which needs at least {least}; "
        )


def test_tokens_that_are_missing_and_other_pins_count() -> None:
    cache = fed(40, SINKS, 30).cache
    cache.pins = ((4, 10),)
    require_free_window(cache, (10, 20), 10, "it")  # 4 + 6 + 10 + 10 leave 10
    with pytest.raises(ConfigError, match=r"^it \(21 tokens\) would leave 9 of 40 tokens"):
        require_free_window(cache, (10, 20), 11, "it")
    with pytest.raises(ConfigError, match=r"^it \(50 tokens\) would leave 0 of 40 tokens"):
        require_free_window(cache, (10, 20), 40, "it")


def of_size(cache_size: int, sinks: int) -> Any:
    return SimpleNamespace(cache_size=cache_size, num_sink_tokens=sinks)


@pytest.mark.parametrize(
    ("size", "sinks", "system", "message"),
    [
        (19, 4, 11, None),
        (12, 4, 0, None),
        (18, 4, 11, "the system prompt (11 tokens) leaves 7 of cache_size = 18 for the conversation, and it needs 8; "
         "shorten it or set cache_size to at least 19"),
        (5, 0, 11, "the system prompt (11 tokens) leaves 0 of cache_size = 5 for the conversation, and it needs 8; "
         "shorten it or set cache_size to at least 19"),
        (8, 0, 1, "the system prompt (1 token) leaves 7 of cache_size = 8 for the conversation, and it needs 8; "
         "shorten it or set cache_size to at least 9"),
        (11, 4, 4, "num_sink_tokens = 4 leaves 7 of cache_size = 11 for the conversation, and it needs 8; "
         "lower it or set cache_size to at least 12"),
    ],
)  # fmt: skip
def test_a_system_prompt_and_sinks_leave_8_tokens(size: int, sinks: int, system: int, message: str | None) -> None:
    if message is None:
        require_window(of_size(size, sinks), system)
        return
    with pytest.raises(ConfigError) as error:
        require_window(of_size(size, sinks), system)
    assert str(error.value) == message
