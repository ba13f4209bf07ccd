"""Short prompts on a model whose steps are recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from streamchat.cache.arguments import cache_keyword
from streamchat.cache.hook import StreamingHook
from streamchat.cache.streaming import StreamingCache
from streamchat.decode.install import install_captured
from tests.support.recorded_graphs import RecordedGraphs


def feed(model: Any, cache: StreamingCache, ids: Tensor) -> Tensor:
    """Feed a prompt; (1, vocabulary) logits of its last token."""
    with torch.inference_mode():
        given = {"input_ids": ids, "use_cache": True, "logits_to_keep": 1, cache_keyword(model): cache}
        logits: Tensor = model(**given).logits[0]
    return logits


@contextmanager
def recorded(model: Any, cache: StreamingCache) -> Iterator[RecordedGraphs]:
    """`model` with captured steps, under the hook of `cache`."""
    graphs = RecordedGraphs()
    assert install_captured(model, graphs.record)
    with StreamingHook(model, cache):
        yield graphs


def assert_same(ours: StreamingCache, theirs: StreamingCache) -> None:
    assert ours.lengths == theirs.lengths
    assert ours.ledger == theirs.ledger
    assert ours.next_position == theirs.next_position
    for mine, other in zip(ours.streaming_layers, theirs.streaming_layers, strict=True):
        torch.testing.assert_close(mine.keys, other.keys, rtol=0, atol=1e-4)
        torch.testing.assert_close(mine.values, other.values, rtol=0, atol=1e-4)
