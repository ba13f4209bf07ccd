"""`tools.archive_soak`: two chats on a tiny model, of which one fills its archive."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.real_engine import tiny_loaded
from tools.archive_soak import PARTS, Figures, lines_of, median_interval, soak


@pytest.mark.slow
def test_the_archive_stays_within_its_quota_and_the_oldest_pages_go_first(tmp_path: Path) -> None:
    settings: dict[str, object] = {"cache_size": 128, "max_new_tokens": 32, "archive_session_mb": 1}
    figures = soak(tiny_loaded(), settings, 1500, tmp_path)
    assert figures.tokens >= 1500
    assert len(figures.memory) == len(figures.disk) == PARTS
    assert len(figures.cpu) == len(figures.wall) > 10
    assert all(ratio > 0 for ratio in figures.cpu)
    assert 0 < max(figures.disk) < 1.1 * figures.quota  # a file has at least 1 MiB
    assert figures.deleted > 0
    assert figures.left > 0
    assert figures.is_oldest_first


def test_the_interval_of_a_median_has_values_of_the_sample() -> None:
    values = [float(value) for value in range(1, 101)]
    assert median_interval(values[::-1]) == (50.5, 41.0, 60.0)
    assert median_interval([2.0]) == (2.0, 2.0, 2.0)


def test_a_deletion_of_newer_pages_is_reported() -> None:
    figures = Figures([1.0], [1.1], 10, [5_000_000], [900_000], 1_000_000, 3, 4, is_oldest_first=False)
    lines = "\n".join(lines_of(figures))
    assert "pages deleted: 3, NOT the oldest ones; left: 4" in lines
    assert "largest archive: 0.9 of 1 MB" in lines
