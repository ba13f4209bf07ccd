"""streamchat's own cache: sinks and a window, positions kept consistent, under any eviction policy."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import DynamicCache

from streamchat.base.eviction_policies import DEFAULT_POLICY
from streamchat.benchmarks.methods.stream import ModelStream
from streamchat.cache.eviction.options import Eviction, EvictionOptions
from streamchat.cache.hook import StreamingHook
from streamchat.cache.positions.strategy import make_cache
from streamchat.cache.streaming import StreamingCache
from streamchat.conversation.conversation import EVICTION_BLOCK
from streamchat.conversation.feeder import Feeder
from streamchat.conversation.log import TokenLog
from streamchat.decode import one_thread

TURN_TOKENS = 64
"""Length of a turn of a text. A text has no turns, so policies that evict whole ones get blocks of equal length: the
same for every policy, tokenizer and chunk size."""


class RollingWindow(ModelStream):
    """The paper's rolling window: each new token evicts the oldest one after the sinks."""

    has_chat_weights = True
    _evicting_s = _evicting_since = 0.0

    def eviction(self) -> EvictionOptions:
        """Return how to evict."""
        return EvictionOptions()

    def begin(self) -> DynamicCache:
        self._evicting_s = 0.0
        options = replace(self.eviction(), before_evict=self._before_evict, on_evict=self._after_evict)
        sizes: dict[str, Any] = {"cache_size": self.method.budget, "num_sink_tokens": self.method.sinks}
        self._streaming = make_cache(self.model, self.fit, **sizes, options=options)
        self.enter(StreamingHook(self.model, self._streaming))
        self._feeder = Feeder(self.model, self._streaming, TokenLog())
        return self._streaming

    def prefill(self, ids: Sequence[int], reserve: int = 0) -> int:
        if reserve:
            self._streaming.begin_turn(len(ids), reserve)
        return one_thread.argmax(self._feeder.feed(ids))

    def decode_step(self, token: int) -> int:
        return one_thread.argmax(self._feeder.forward([token]))

    @property
    def streaming(self) -> StreamingCache:
        """The cache of the stream."""
        return self._streaming

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values per token."""
        return self._streaming.token_bytes

    @property
    def evicting_s(self) -> float | None:
        return self._evicting_s

    def _before_evict(self) -> None:
        self._evicting_since = time.perf_counter()

    def _after_evict(self, _: Eviction) -> None:
        self._evicting_s += time.perf_counter() - self._evicting_since
        self.compressions += 1


class Chat(RollingWindow):
    """The cache as a chat uses it, evicting in blocks."""

    evict = DEFAULT_POLICY
    """The eviction policy; set it before `start`."""

    def eviction(self) -> EvictionOptions:
        return EvictionOptions(self.evict, block=EVICTION_BLOCK)


class EvictionPolicyStream(RollingWindow):
    """The eviction policy of the method's name. A text that is scored is cut into turns of `TURN_TOKENS`."""

    def eviction(self) -> EvictionOptions:
        return EvictionOptions(self.method.kind)

    def feed(self, ids: Tensor, keep: int = 0) -> Tensor:
        cache = self._streaming
        first = cache.ledger.next_index
        logits = super().feed(ids, keep)
        # up to that of the next token: a later start would look like one to a policy
        indices = range(first + 1 if first else 0, cache.ledger.next_index + 1)
        cache.turn_starts += [index for index in indices if index % TURN_TOKENS == 0]
        return logits
