"""Feeding ids to the model in chunks, with cache and token log kept equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from streamchat.base.errors import CacheError
from streamchat.cache.arguments import cache_keyword
from streamchat.cache.eviction.ledger import Ledger
from streamchat.cache.streaming import StreamingCache
from streamchat.conversation.log import TokenLog
from streamchat.decode.install import tokens_at_once

# Large enough to be fast, small enough that a stop is felt at once.
PREFILL_CHUNK = 256
# oneDNN, which multiplies 16-bit matrices on a CPU, compiles and keeps code for every number of tokens it meets: with
# chunks of any length the process grew from 728 to 871 MB in 160 prompts, with multiples of 16 not at all.
PADDED_TO = 16


class Feeder:
    """Runs forwards of one model on one cache, and records what was fed.

    Args:
        model: A causal LM in eval mode, under the hook of `cache`.
        cache: Where keys and values go.
        log: Gets every id, in order.
    """

    def __init__(self, model: Any, cache: StreamingCache, log: TokenLog) -> None:
        self.model, self.cache, self.log = model, cache, log
        self.device: torch.device = model.get_input_embeddings().weight.device
        sixteen_bit_cpu = self.device.type == "cpu" and model.dtype != torch.float32
        self.padded_to = PADDED_TO if sixteen_bit_cpu and cache.croppable else 1
        """Chunks are fed at multiples of this length where there is room."""
        self._cache_name = cache_keyword(model)

    def feed(self, ids: Sequence[int], after_chunk: Callable[[int], None] = lambda done: None) -> Tensor:
        """Feed all of `ids`; logits (vocabulary,) after the last one, empty without ids.

        Args:
            ids: Token ids.
            after_chunk: Called before each chunk and after the last one with the count of ids fed so far; may raise
                to end it there.
        """
        logits = torch.empty(0)
        done = 0
        while done < len(ids):
            after_chunk(done)
            piece = ids[done : done + self._chunk_size()]
            logits = self.forward(piece)
            done += len(piece)
        after_chunk(done)
        return logits

    def rebuild(self, stop: int) -> None:
        """Make the cache hold what it holds of the log before index `stop`, by reading that again from its ids.

        For models with a recurrent state, from which nothing can be cut. The state then knows kept tokens only.
        """
        runs = [(first, min(last, stop)) for first, last in self.cache.ledger.runs if first < stop]
        self.prefill_runs(runs, stop)

    def prefill_runs(self, runs: Sequence[tuple[int, int]], stop: int) -> int:
        """Make the cache hold the tokens of the log at `runs`, as part of a stream of `stop` tokens; returns how many.

        They take nothing any more from what was evicted before them. Pins, turn starts and counters stay, as far as
        they are before `stop`. If a forward fails, the cache holds the tokens that were read until then, or nothing
        where it has a recurrent state.

        Raises:
            CacheError: They do not fit into the budget.
        """
        cache, log = self.cache, self.log
        kept = log.ids_at(runs)
        if len(kept) > cache.cache_size:
            raise CacheError(f"{len(kept)} tokens to read again do not fit into a cache of {cache.cache_size}")
        starts = [start for start in cache.turn_starts if start < stop]
        pins, count = cache.pins, cache.compression_count
        cache.reset()
        self.log = TokenLog()  # what is read again is in the log already
        try:
            self.feed(kept)
        finally:
            self.log = log
            cache.discard_partial_forward()
            if cache.length < len(kept) and not cache.croppable:
                cache.reset()
            cache.ledger = Ledger(list(runs), stop).first(cache.length)
            if cache.seen is not None:
                cache.seen.clear()
                cache.seen.append(torch.tensor([log.ids[:stop].tolist()], dtype=torch.int32))
            cache.turn_starts, cache.pins, cache.compression_count = starts, pins, count
        return len(kept)

    @torch.inference_mode()
    def forward(self, ids: Sequence[int]) -> Tensor:
        """Feed `ids` as one chunk; logits (vocabulary,) after the last one."""
        padding = self._padding(len(ids))
        rest = len(ids) % self.padded_to
        if rest and not padding and len(ids) > self.padded_to:
            # No room for padding: the whole multiples first, so that few lengths are ever met.
            self.forward(ids[:-rest])
            return self.forward(ids[-rest:])
        # Causal: what follows a token changes nothing for it. The padding is cut off again below.
        tokens = torch.tensor([[*ids, *[ids[-1]] * padding]], dtype=torch.long, device=self.device)
        out = self.model(input_ids=tokens, use_cache=True, logits_to_keep=padding + 1, **{self._cache_name: self.cache})
        if padding:
            self.cache.crop_newest(padding)
        self.log.append(ids)
        logits: Tensor = out.logits[0, -padding - 1]
        return logits.to(self.device)  # the last layers may be on another one

    def _padding(self, count: int) -> int:
        wanted = -count % self.padded_to if count > max(1, tokens_at_once(self.model)) else 0
        if not wanted:
            return 0
        # Nothing may be evicted for the sake of padding.
        self.cache.make_room(count)
        return wanted if self.cache.length + count + wanted <= self.cache.cache_size else 0

    def _chunk_size(self) -> int:
        if self.cache.fit.single_steps and self.cache.length:
            return 1
        # A quarter of the room: when a prompt is larger than the cache, each chunk still sees what came before it.
        return min(PREFILL_CHUNK, max(1, (self.cache.cache_size - self.cache.kept) // 4))
