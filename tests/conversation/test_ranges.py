"""Decisions that need no model: ranges for a summary and a page-in, room for pins, lost memory, and later formats."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamchat.base.errors import ConfigError
from streamchat.base.events import Segment
from streamchat.cache.eviction.ledger import Ledger
from streamchat.conversation.pins import require_free_window, require_window
from streamchat.conversation.recall import _left
from streamchat.conversation.rollback import release_memory
from streamchat.conversation.summarize import next_to_evict
from streamchat.conversation.template.chat_format import ChatFormat


def a_segment(turn: int, tokens: int, pinned: bool = False) -> Segment:
    return Segment("user" if turn else "system", turn, tokens, tokens, pinned)


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        ((), None),
        ((a_segment(0, 90),), None),
        ((a_segment(1, 90, pinned=True),), None),
        ((a_segment(0, 90), a_segment(2, 10)), (2, 2)),
        ((a_segment(1, 49), a_segment(2, 1), a_segment(3, 1)), (1, 2)),  # 50 of 100 fill the half
        ((a_segment(1, 49), a_segment(2, 0), a_segment(3, 1)), (1, 3)),
        ((a_segment(1, 50), a_segment(1, 50), a_segment(2, 1)), (1, 1)),  # a turn is not split
        ((a_segment(1, 49), a_segment(2, 90, pinned=True), a_segment(3, 9), a_segment(4, 9)), (1, 3)),
    ],
)
def test_the_oldest_turns_that_fill_half_of_the_window_are_summarized(
    segments: tuple[Segment, ...], expected: tuple[int, int] | None
) -> None:
    assert next_to_evict(segments, 100) == expected


RUNS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 4)).map(lambda run: (run[0], run[0] + run[1])), max_size=4)


@given(RUNS, st.lists(RUNS, max_size=3))
def test_a_page_in_needs_every_token(wanted: list[tuple[int, int]], kept: list[list[tuple[int, int]]]) -> None:
    there = {index for runs in kept for run in runs for index in range(*run)}
    tokens: Any = [SimpleNamespace(runs=tuple(runs)) for runs in kept]
    assert _left(wanted, tokens) == any(index not in there for run in wanted for index in range(*run))


@pytest.mark.parametrize(("device", "expected"), [("cuda", ["cuda"]), ("mps", ["mps"]), ("cpu", [])])
def test_memory_is_released_on_the_device(device: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    released = list[str]()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: released.append("cuda"))
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: released.append("mps"))
    release_memory(torch.device(device))
    assert released == expected


def a_cache(cached: int, size: int = 64, sinks: int = 4, pins: tuple[tuple[int, int], ...] = ((0, 10),)) -> Any:
    """A cache with the log indices 0 to `cached` - 1."""
    retained = max(sinks, *(stop for _, stop in pins))
    return SimpleNamespace(
        cache_size=size, num_sink_tokens=sinks, pins=pins, ledger=Ledger([(0, cached)], cached), num_retained=retained
    )


def test_pins_leave_a_quarter_of_the_cache() -> None:
    cache = a_cache(60)
    require_free_window(cache, (20, 58), 0, "pinning turn 2")  # 10 + 38 of 64
    with pytest.raises(ConfigError) as caught:
        require_free_window(cache, (20, 59), 0, "pinning turn 2")
    assert str(caught.value) == (
        "pinning turn 2 (39 tokens) would leave 15 of 64 tokens for the conversation, which needs at least 16; unpin "
        "another turn, or restart with a larger --cache-size"
    )
    require_free_window(cache, (20, 50), 8, "x")
    with pytest.raises(ConfigError, match=r"x \(39 tokens\) would leave 15 of 64 "):
        require_free_window(cache, (20, 50), 9, "x")
    with pytest.raises(ConfigError, match=r"would leave 0 of 64 "):
        require_free_window(cache, (20, 60), 30, "x")
    cache.recalled, cache.num_retained = ((12, 50),), 48  # evictable from the next message on
    with pytest.raises(ConfigError, match=r"pinning turn 2 \(39 tokens\) would leave 15 of 64 "):
        require_free_window(cache, (20, 59), 0, "pinning turn 2")


def test_a_small_cache_needs_a_window_of_8() -> None:
    cache = a_cache(20, size=24)
    require_free_window(cache, (10, 16), 0, "x")
    with pytest.raises(ConfigError, match="would leave 7 of 24 tokens for the conversation, which needs at least 8;"):
        require_free_window(cache, (10, 17), 0, "x")


@pytest.mark.parametrize(
    ("sinks", "system", "sentence"),
    [
        (4, 8, ""),
        (
            4,
            9,
            "the system prompt (9 tokens) leaves 7 of cache_size = 16 for the conversation, and it needs 8; shorten it",
        ),
        (
            4,
            20,
            "the system prompt (20 tokens) leaves 0 of cache_size = 16 for the conversation, and it needs 8; shorten",
        ),
        (8, 8, ""),
        (9, 8, "num_sink_tokens = 9 leaves 7 of cache_size = 16 for the conversation, and it needs 8; lower it or set"),
        (9, 9, "num_sink_tokens = 9 leaves 7 of cache_size = 16 "),
    ],
)
def test_sinks_and_a_system_prompt_leave_a_window(sinks: int, system: int, sentence: str) -> None:
    cache = a_cache(0, size=16, sinks=sinks)
    if not sentence:
        require_window(cache, system)
        return
    with pytest.raises(ConfigError) as caught:
        require_window(cache, system)
    assert str(caught.value).startswith(sentence)
    assert str(caught.value).endswith(f" or set cache_size to at least {max(sinks, system) + 8}")


def test_a_format_after_another_keeps_its_start() -> None:
    base = ChatFormat("a", "<s>", "Be kind.", "</s>", "<first>", "<user>", "<bot>", "</bot>")
    later = replace(base, user_open="<later>", fallbacks=("clock",), notes=("a clock",), renew=lambda: later)
    same = later.after(base)
    assert (same.user_open, same.fallbacks, same.notes) == ("<later>", ("clock",), ("a clock",))
    assert same.renew is not None
    assert same.renew().system_prompt == "Be kind."
    other = replace(base, system_open="<S>", first_user_open="<1>")
    kept = later.after(other)
    assert (kept.system_open, kept.first_user_open, kept.user_open) == ("<S>", "<1>", "<later>")
    assert kept.fallbacks == ("clock", "start-kept")
    assert len(kept.notes) == 2
    assert kept.renew is not None
    assert kept.renew().system_open == "<S>"
    assert base.after(other).renew is None
    assert base.system_block == "<s>Be kind.</s>"
    assert base.identity == base.parts == ("<first>", "<user>", "<bot>", "</bot>", base.strips)
    assert replace(base, fixed_identity=(1,)).identity == (1,)
    assert replace(base, strips=True).message(" a\n") == "a"
    assert replace(base, strips=False).given_reply(" a\n") == " a\n"
