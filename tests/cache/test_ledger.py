"""The ledger, against lists that are written out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamchat.cache.eviction.ledger import Ledger

STEPS = st.lists(
    st.tuples(st.sampled_from(["append", "evict", "crop"]), st.integers(0, 12), st.integers(0, 12)), max_size=30
)


@given(STEPS)
def test_the_ledger_is_a_list_of_log_indices(steps: list[tuple[str, int, int]]) -> None:
    ledger, slots, fed = Ledger(), list[int](), 0
    for kind, count, prefix in steps:
        if kind == "append":
            ledger.append(count)
            slots += range(fed, fed + count)
            fed += count
        elif kind == "evict":
            dropped = ledger.evict(prefix, count)
            expected, slots = slots[prefix : prefix + count], slots[:prefix] + slots[prefix + count :]
            assert [i for first, stop in dropped for i in range(first, stop)] == expected
        else:
            kept = max(0, len(slots) - count)
            ledger.crop(count)
            fed = slots[kept] if kept < len(slots) else fed
            slots = slots[:kept]
        assert list(ledger) == slots
        assert len(ledger) == len(slots)
        assert ledger.next_index == fed
        assert all(first < stop for first, stop in ledger.runs)
        # neighbouring runs are joined, or there would be one per token in the end
        assert all(a[1] < b[0] for a, b in zip(ledger.runs, ledger.runs[1:], strict=False))
        for index in range(fed + 2):
            assert ledger.slot_from(index) == sum(i < index for i in slots)
        for slot, index in enumerate(slots):
            assert ledger.index_at(slot) == index
        assert ledger.index_at(len(slots)) == fed
        assert ledger.count_in(2, 7) == sum(2 <= i < 7 for i in slots)


def test_dropping_nothing_splits_nothing() -> None:
    ledger = Ledger()
    ledger.append(10)
    assert ledger.evict(3, 0) == []
    assert ledger.runs == [(0, 10)]


def test_a_slot_past_the_end_is_an_error() -> None:
    ledger = Ledger()
    ledger.append(3)
    with pytest.raises(IndexError, match="past the end"):
        ledger.index_at(4)
