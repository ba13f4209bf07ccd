"""A stream of random chunks through a cache that evicts, pins, rebases, and pages in, with what it was at each turn."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from streamchat.cache import checkpoint
from streamchat.cache.arguments import cache_keyword
from streamchat.cache.eviction.options import EvictionOptions
from streamchat.cache.history import CacheHistory, evicted_by
from streamchat.cache.hook import StreamingHook
from streamchat.cache.layers.codes import INT4, K8V4, CacheDtype
from streamchat.cache.paging import missing_runs, page_in
from streamchat.cache.positions.strategy import make_cache
from streamchat.cache.streaming import StreamingCache
from tests.support.families import FAMILIES, SERVED, text
from tests.support.family_runs import BUDGET, SINKS, Subject
from tests.support.family_settings import HYBRID

SMOKE = {"llama", "gpt_neox", "deepseek_v3", "bloom"}
STATES = {"jamba", *(family.name for family in HYBRID)}
CUT = [name for name in SERVED if FAMILIES[name].served != "recompute" and name not in STATES]


DTYPES: dict[str, CacheDtype | None] = {"native": None, "int8": torch.int8, "k8v4": K8V4, "int4": INT4}


def dtypes_of(name: str) -> tuple[str, str]:
    """Numbers, and one kind of codes: every second family has the other one, which differs in nothing but rounding."""
    return "native", ("int8", "int4")[CUT.index(name) % 2]


POLICIES = (("oldest-tokens", 1), ("key-diversity", 2))
"""Policies with the seeds of their streams."""


def policies_of(name: str, kv: str) -> tuple[tuple[str, int], ...]:
    """Both policies for a few families. Others: one for numbers and the other for codes, by turns."""
    if name in SMOKE:
        return POLICIES
    return (POLICIES[(CUT.index(name) // 2 + (kv == "native")) % 2],)


@dataclass(frozen=True)
class Moment:
    """A cache and its history at the start of a turn."""

    mark: int
    stop: int
    saved: checkpoint.CacheCheckpoint

    def must_be(self, cache: StreamingCache) -> None:
        """All tensors, also the float32 copies of what has moved, and the positions."""
        now = checkpoint.capture(cache)
        assert now.runs == self.saved.runs
        assert now.bases == self.saved.bases
        assert now.tensors.keys() == self.saved.tensors.keys()
        for name, tensor in self.saved.tensors.items():
            assert torch.equal(now.tensors[name], tensor), name


class Stream:
    """Feeds random chunks, and evicts as turns, pins and rebases make it."""

    def __init__(self, it: Subject, policy: str, seed: int, dtype: CacheDtype | None = None) -> None:
        options = EvictionOptions(policy=policy)
        self.cache = make_cache(
            it.model, it.fit, cache_size=BUDGET, num_sink_tokens=SINKS, dtype=dtype, options=options
        )
        self.cache.history = self.history = CacheHistory(self.cache)
        self.model, self.random = it.model, random.Random(seed)
        self.ids = text(4000, seed=seed)
        self.moments: list[Moment] = []

    def begin(self) -> None:
        self.moments.append(Moment(self.history.mark, self.cache.ledger.next_index, checkpoint.capture(self.cache)))
        self.history.begin_turn()

    def feed(self, count: int) -> Tensor:
        at = self.cache.ledger.next_index
        with StreamingHook(self.model, self.cache), torch.inference_mode():
            ids = self.ids[:, at : at + count]
            logits: Tensor = self.model(
                input_ids=ids, use_cache=True, **{cache_keyword(self.model): self.cache}
            ).logits[0]
        return logits

    def turn(self) -> None:
        self.begin()
        self.cache.begin_turn(self.random.randint(1, 8), self.random.randint(0, 8))
        for _ in range(self.random.randint(1, 5)):
            self.feed(self.random.randint(1, 6))
        if self.random.random() < 0.2:  # one cached turn is retained from now on
            first = self.random.choice(list(self.cache.ledger)[SINKS:-6])
            self.cache.pins = ()
            self.cache.pin(first, first + 4)

    def page_in(self) -> int:
        """Put some evicted tokens back among the others, and pin them sometimes; return how many."""
        kept = [tokens for step in self.history.since(0) if (tokens := evicted_by(step)) is not None]
        missing = missing_runs(self.cache, [run for tokens in kept for run in tokens.runs])
        if not missing:
            return 0
        first, stop = self.random.choice(missing)
        stop = min(stop, first + self.random.randint(1, 6))
        self.cache.pins = ()
        if self.random.random() < 0.5:
            self.cache.pin(first, stop)
        self.cache.make_room(stop - first)
        return page_in(self.cache, kept, [(first, stop)])

    def undo(self, moment: Moment) -> None:
        self.cache.crop_from(moment.stop)
        self.history.undo_to(moment.mark, moment.stop)
