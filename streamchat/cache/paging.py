"""Pages evicted tokens back into a cache, in their old order and at the right positions, without a forward pass.

A key that is not rotated can be rotated to any position. A turn that is paged in right after its eviction has the keys
and values that it would have without the eviction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from streamchat.base.errors import CacheError
from streamchat.cache.evicted import EvictedTokens
from streamchat.cache.eviction.policy import Run, merged_runs
from streamchat.cache.form import Form, new_form
from streamchat.cache.history import Cache
from streamchat.cache.layers.cuts import StateBefore
from streamchat.cache.layers.inserts import Originals, insert_originals, save_insert, undo_insert, unrotated
from streamchat.cache.recompute import RecomputingCache

if TYPE_CHECKING:
    from streamchat.cache.streaming import StreamingCache


def can_page_in(cache: StreamingCache) -> bool:
    """Return whether tokens can be paged in: not if a layer has a recurrent state, or if positions are learned."""
    return cache.croppable and not isinstance(cache, RecomputingCache)


@dataclass(frozen=True)
class InsertStep:
    """An insertion of evicted tokens into consecutive slots."""

    at: int
    """The slot of the first one."""
    runs: tuple[Run, ...]
    before: StateBefore
    form: Form
    """That of the cache before the insertion."""

    @property
    def nbytes(self) -> int:
        """See `Step`."""
        return self.before.nbytes

    def undo(self, cache: Cache, stop: int) -> None:
        """See `Step`."""
        count = sum(last - first for first, last in self.runs)
        keep = sum(min(last, stop) - first for first, last in self.runs if first < stop)
        undo_insert(cache.streaming_layers, self.before, self.at, count, keep)
        if keep:
            cache.ledger.evict(self.at, keep)
        cache.form = self.form


def page_in(cache: StreamingCache, evicted: Sequence[EvictedTokens], wanted: Sequence[Run]) -> int:
    """Put the tokens with log indices in `wanted` that are not cached back into `cache`; return their number.

    The cache must have room for them. They can be evicted again, unless they are pinned.

    Args:
        cache: A cache for which `can_page_in` is true.
        evicted: The tokens. If several have the same token, the last one is used.
        wanted: Runs of log indices.

    Raises:
        CacheError: Some tokens are missing from `evicted`, or there is no room. The cache is then unchanged.
    """
    missing = missing_runs(cache, wanted)
    count = sum(stop - first for first, stop in missing)
    if cache.length + count > cache.cache_size:
        raise CacheError(f"{count} tokens do not fit into the {cache.cache_size - cache.length} free ones of the cache")
    with torch.inference_mode(False), torch.no_grad():
        pieces = _pieces(cache, evicted, missing)
        layers = cache.streaming_layers
        if count and layers[0].base < count:
            cache.rebase_positions(count)
        # pieces without cached tokens between them are inserted at once: each insertion writes all slots before it
        groups = groupby(pieces, key=lambda piece: cache.ledger.slot_from(piece[0][0]))
        for at, group in reversed([(at, list(group)) for at, group in groups]):
            _insert(cache, at, group)
    if any(not each.is_exact and _places(each, missing) for each in evicted):
        cache.form = new_form()  # what they were before cannot be put together any more
    return count


def missing_runs(cache: StreamingCache, wanted: Sequence[Run]) -> list[Run]:
    """Return the parts of the runs `wanted` that are not cached."""
    missing: list[Run] = []
    for first, stop in merged_runs(wanted):
        at = first
        for a, b in [*cache.ledger.runs, (stop, stop)]:
            if at < min(a, stop):
                missing.append((at, min(a, stop)))
            at = max(at, b)
    return missing


def _insert(cache: StreamingCache, at: int, pieces: list[tuple[Run, list[Originals]]]) -> None:
    layers = cache.streaming_layers
    runs = tuple(merged_runs(run for run, _ in pieces))
    originals = pieces[0][1]
    if len(pieces) > 1:
        columns = zip(*(tokens for _, tokens in pieces), strict=True)
        originals = [
            (torch.cat([keys for keys, _ in column], dim=2), torch.cat([values for _, values in column], dim=2))
            for column in columns
        ]
    if cache.history is not None:
        before = save_insert(layers, at)
        cache.history.add(InsertStep(at, runs, before, cache.form))
        cache.history.report_moved(before, at)
    insert_originals(layers, at, originals)
    cache.ledger.runs = merged_runs([*cache.ledger.runs, *runs])


def _pieces(
    cache: StreamingCache, evicted: Sequence[EvictedTokens], missing: Sequence[Run]
) -> list[tuple[Run, list[Originals]]]:
    """Return (run, originals per layer) for ascending runs that cover `missing`.

    Raises:
        CacheError: A token is missing from `evicted`.
    """
    left = list(missing)
    pieces: list[tuple[Run, list[Originals]]] = []
    for tokens in reversed(evicted):
        places = _places(tokens, left)
        if not places:
            continue
        for run, at in places:
            wanted = (at, at + run[1] - run[0])
            found = unrotated(cache.streaming_layers, tokens.slots, tokens.originals, tokens.position, wanted)
            pieces.append((run, found))
            left = [part for first, stop in left for part in _without(first, stop, run)]
    if left:
        raise CacheError(f"the keys and values of the tokens {left[0][0]} to {left[0][1] - 1} are not kept")
    return sorted(pieces, key=lambda piece: piece[0])


def _places(tokens: EvictedTokens, wanted: Sequence[Run]) -> list[tuple[Run, int]]:
    """Return the parts of `wanted` that `tokens` has, each with the index of its first token in `tokens`."""
    found, at = list[tuple[Run, int]](), 0
    for first, stop in tokens.runs:
        for a, b in wanted:
            run = (max(first, a), min(stop, b))
            if run[0] < run[1]:
                found.append((run, at + run[0] - first))
        at += stop - first
    return found


def _without(first: int, stop: int, run: Run) -> list[Run]:
    return [part for part in ((first, min(stop, run[0])), (max(first, run[1]), stop)) if part[0] < part[1]]
