"""Ranges of tokens and turns that are chosen without a model: for a summary, for a page-in, and after lost memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamchat.base.events import Segment
from streamchat.conversation.recall import _left
from streamchat.conversation.rollback import is_out_of_memory, release_memory
from streamchat.conversation.summarize import next_to_evict


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


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("shapes differ"), False),
    ],
)
def test_errors_of_missing_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


@pytest.mark.parametrize(("device", "expected"), [("cuda", ["cuda"]), ("mps", ["mps"]), ("cpu", [])])
def test_memory_is_released_on_the_device(device: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    released = list[str]()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: released.append("cuda"))
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: released.append("mps"))
    release_memory(torch.device(device))
    assert released == expected
