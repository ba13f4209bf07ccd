"""Feeds ids to the model in chunks, and keeps cache and token log consistent."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from streamchat.base.errors import CacheError
from streamchat.cache.arguments import cache_keyword
from streamchat.cache.eviction.ledger import Ledger
from streamchat.cache.streaming import StreamingCache
from streamchat.cache.token_ids import input_device
from streamchat.conversation.chunk_size import ChunkSize
from streamchat.conversation.log import TokenLog
from streamchat.decode.install import tokens_at_once

# oneDNN, which multiplies 16-bit matrices on a CPU, compiles and caches code for each chunk length: with arbitrary
# lengths the process grew from 728 to 871 MB in 160 prompts, with multiples of 16 it did not grow.
PADDED_TO = 16


class Feeder:
    """Runs forward passes of one model on one cache, and records the ids.

    Args:
        model: A causal LM in eval mode, with the hook of `cache` attached.
        cache: The cache for keys and values.
        log: Every id is appended to it, in order.
    """

    def __init__(self, model: Any, cache: StreamingCache, log: TokenLog) -> None:
        self.model, self.cache, self.log = model, cache, log
        self.device = input_device(model)
        sixteen_bit_cpu = self.device.type == "cpu" and model.dtype != torch.float32
        self.padded_to = PADDED_TO if sixteen_bit_cpu and cache.croppable else 1
        """Chunks are padded to a multiple of this length if the cache has room."""
        self.chunk_size = ChunkSize(self.device.type)
        self._cache_name = cache_keyword(model)

    def feed(self, ids: Sequence[int], after_chunk: Callable[[int], None] = lambda done: None) -> Tensor:
        """Feed `ids` in chunks; return the logits (vocab_size,) after the last one, empty without ids.

        Args:
            ids: Token ids.
            after_chunk: Called with the number of ids fed so far, before each chunk and after the last one. May raise
                to stop there.
        """
        logits = torch.empty(0)
        done = 0
        while done < len(ids):
            after_chunk(done)
            piece = ids[done : done + self._chunk_size(len(ids), len(ids) - done)]
            logits = self._forward_timed(piece) if len(piece) < len(ids) else self.forward(piece)
            done += len(piece)
        after_chunk(done)
        return logits

    def cut(self, stop: int) -> None:
        """Cut log and cache at log index `stop`.

        A recurrent state cannot be cropped: the cached tokens before `stop` are prefilled again, and the state then
        contains cached tokens only.
        """
        self.log.cut(stop)
        if self.cache.croppable:
            self.cache.crop_from(stop)
            return
        runs = [(first, min(last, stop)) for first, last in self.cache.ledger.runs if first < stop]
        self.prefill_runs(runs, stop)

    def prefill_runs(self, runs: Sequence[tuple[int, int]], stop: int) -> int:
        """Replace the contents of the cache by the log's tokens at `runs`, of a stream of `stop` tokens.

        Their keys and values then no longer depend on evicted tokens. Pins, counters, and turn starts before `stop` do
        not change. If a forward fails, the cache has the tokens fed until then, or none if it has a recurrent state.

        Returns:
            The number of tokens prefilled.

        Raises:
            CacheError: The tokens exceed the cache budget.
        """
        cache, log = self.cache, self.log
        kept = log.ids_at(runs)
        if len(kept) > cache.cache_size:
            raise CacheError(f"{len(kept)} tokens to prefill do not fit into a cache of {cache.cache_size} tokens")
        starts = [start for start in cache.turn_starts if start < stop]
        pins, count = cache.pins, cache.compression_count
        cache.reset()
        self.log = TokenLog()  # the tokens are in the log already
        try:
            self.feed(kept)
        finally:
            self.log = log
            cache.discard_partial_forward()
            if cache.length < len(kept) and not cache.croppable:
                cache.reset()
            cache.ledger = Ledger(list(runs), stop).first(cache.length)
            self.set_fed_tokens(stop)
            cache.turn_starts, cache.pins, cache.compression_count = starts, pins, count
        return len(kept)

    def set_fed_tokens(self, stop: int) -> None:
        """Replace the ids that the cache recorded, if it does, by those of the log up to log index `stop`."""
        if self.cache.fed_tokens is not None:
            self.cache.fed_tokens.clear()
            self.cache.fed_tokens.append(torch.tensor([self.log.ids[:stop].tolist()], dtype=torch.int32))

    @torch.inference_mode()
    def forward(self, ids: Sequence[int]) -> Tensor:
        """Feed `ids` as one chunk; return the logits (vocab_size,) after the last one."""
        padding = self._padding(len(ids))
        rest = len(ids) % self.padded_to
        if rest and not padding and len(ids) > self.padded_to:
            # No room for padding: feed the whole multiples first, to keep the number of different lengths small.
            self.forward(ids[:-rest])
            return self.forward(ids[-rest:])
        # Causal attention: padding after a token does not affect it. The padding is cropped below.
        logits = self._run([*ids, *[ids[-1]] * padding], padding + 1)[-padding - 1]
        if padding:
            self.cache.crop_newest(padding)
        self.log.append(ids)
        return logits

    @torch.inference_mode()
    def forward_proposals(self, token: int, proposals: Sequence[int]) -> Tensor:
        """Feed `token` and `proposals` as one chunk; return the logits (n, vocabulary) after each of them.

        Only `token` is appended to the log. Call `accept` for each accepted proposal, then `drop_rejected`.
        """
        logits = self._run([token, *proposals], 1 + len(proposals))
        self.log.append([token])
        return logits

    def accept(self, proposal: int) -> None:
        """Append the next proposal to the log."""
        self.log.append([proposal])

    def drop_rejected(self) -> None:
        """Remove the proposals that were not accepted from the cache."""
        self.cache.crop_newest(self.cache.ledger.next_index - len(self.log))

    def _run(self, ids: Sequence[int], keep: int) -> Tensor:
        """Return the last `keep` rows of the logits of a forward, (keep, vocabulary)."""
        tokens = torch.tensor([ids], dtype=torch.long, device=self.device)
        out = self.model(input_ids=tokens, use_cache=True, logits_to_keep=keep, **{self._cache_name: self.cache})
        logits: Tensor = out.logits[0, -keep:]
        return logits.to(self.device)  # the last layers may be on another device

    def _forward_timed(self, ids: Sequence[int]) -> Tensor:
        """Like `forward`, for one of several chunks; waits for a GPU, so that the prompt can be stopped after each."""
        started = time.perf_counter()
        logits = self.forward(ids)
        self._wait_for_device()
        if self.chunk_size.is_measured(len(ids)):
            self.chunk_size.note(time.perf_counter() - started)
        return logits

    def _wait_for_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _padding(self, count: int) -> int:
        wanted = -count % self.padded_to if count > max(1, tokens_at_once(self.model)) else 0
        if not wanted:
            return 0
        # Padding must not cause an eviction.
        self.cache.make_room(count)
        return wanted if self.cache.length + count + wanted <= self.cache.cache_size else 0

    def _chunk_size(self, prompt: int, left: int) -> int:
        if self.cache.fit.single_steps and self.cache.length:
            return 1
        return self.chunk_size.of(self.cache, prompt, left)
