"""The recorded ids, against a tensor of them, and the context length of a configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamchat.cache.context import context_length
from streamchat.cache.fed_tokens import FedTokens

STEPS = st.lists(
    st.tuples(st.sampled_from(["append", "truncate", "select", "repeat", "clear"]), st.integers(1, 300)), max_size=8
)


@given(STEPS)
def test_fed_tokens_are_a_tensor_that_grows(steps: list[tuple[str, int]]) -> None:
    fed, plain = FedTokens(), torch.empty(0, 0, dtype=torch.long)
    for step, (kind, number) in enumerate(steps):
        rows = plain.shape[0]
        if kind == "append":
            ids = torch.arange(step * 1000, step * 1000 + max(rows, 2) * number).view(max(rows, 2), number)
            fed.append(ids)
            plain = torch.cat([plain.view(len(ids), -1) if rows else ids[:, :0], ids], dim=1)
        elif kind == "truncate":
            fed.truncate(number)
            plain = plain[:, :number]
        elif kind == "clear":
            fed.clear()
            plain = torch.empty(0, 0, dtype=torch.long)
        elif rows:
            chosen = torch.arange(rows - 1, -1, -1) if kind == "select" else torch.arange(rows).repeat_interleave(2)
            fed.select(chosen) if kind == "select" else fed.repeat(2)
            plain = plain[chosen]
        count = plain.shape[1]
        if count:
            assert fed.rows == len(plain)
            found = fed.gather([(0, count // 2), (count // 2, count)])
            assert found.dtype == torch.long
            assert torch.equal(found, plain)
            assert fed.is_prefix_of(plain)
            assert fed.is_prefix_of(torch.cat([plain, plain], dim=1))
            assert not fed.is_prefix_of(plain[:, :-1])
            assert not fed.is_prefix_of(torch.cat([plain, plain]))
            other = plain.clone()
            other[-1, -1] += 1
            assert not fed.is_prefix_of(other)
            fed.known = False
            assert not fed.is_prefix_of(plain)
            fed.known = True


def test_no_runs_are_no_ids() -> None:
    fed = FedTokens()
    fed.append(torch.zeros(3, 2, dtype=torch.long))
    assert fed.gather([]).shape == (3, 0)
    assert fed.gather([]).dtype == torch.long


@pytest.mark.parametrize("name", ["max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"])
@pytest.mark.parametrize(("value", "expected"), [(1, 1), (2048, 2048), (0, None), (-1, None), ("8", None)])
def test_a_context_length_has_several_names(name: str, value: Any, expected: int | None) -> None:
    config: Any = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**{name: value}))
    assert context_length(config) == expected


def test_a_configuration_may_name_no_context_length() -> None:
    assert context_length(SimpleNamespace(get_text_config=SimpleNamespace)) is None


def test_a_long_text_is_recorded_at_once() -> None:
    fed = FedTokens()
    fed.append(torch.arange(600).view(2, 300))
    fed.append(torch.tensor([[7], [8]]))
    assert (len(fed), fed.rows) == (301, 2)
    assert fed.gather([(299, 301)]).tolist() == [[299, 7], [599, 8]]
