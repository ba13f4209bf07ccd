"""Sizes derived from the cache budget."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from streamchat.cache.positions.probe import rope_kinds
from streamchat.cache.room import budget_from_ratio, quarter_of_room


@pytest.mark.parametrize(
    ("context", "ratio", "sinks", "budget"),
    [(2048, 0.5, 4, 1024), (2048, 0.0, 4, 2048), (1001, 0.25, 4, 750), (2048, 0.999, 4, 14), (2048, 0.999, 0, 10)],
)
def test_the_budget_of_a_ratio(context: int, ratio: float, sinks: int, budget: int) -> None:
    assert budget_from_ratio(context, ratio, sinks) == budget


@pytest.mark.parametrize(
    ("cache_size", "retained", "most", "size"),
    [(64, 4, 512, 15), (4096, 4, 512, 512), (16, 14, 512, 1), (16, 16, 9, 1)],
)
def test_a_quarter_of_the_room(cache_size: int, retained: int, most: int, size: int) -> None:
    assert quarter_of_room(cache_size, retained, most) == size


@pytest.mark.parametrize(
    ("given", "kinds"),
    [
        ({"rope_type": "longrope"}, ["longrope"]),
        ({"rope_type": {"full_attention": "dynamic", "sliding_attention": "default"}}, ["dynamic", "default"]),
        ({"rope_type": None}, []),
        ({}, []),
    ],
)
def test_the_rope_kinds_of_a_module(given: dict[str, Any], kinds: list[str]) -> None:
    module: Any = SimpleNamespace(**given)
    assert rope_kinds(module) == kinds
