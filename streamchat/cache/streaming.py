"""`StreamingCache`: a `DynamicCache` that never exceeds its budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache

from streamchat.base.errors import CacheError, ConfigError
from streamchat.base.events.cache import Trigger
from streamchat.cache.eviction.guard import plan_cuts
from streamchat.cache.eviction.ledger import Ledger
from streamchat.cache.eviction.options import Eviction, EvictionOptions, TurnPlan
from streamchat.cache.eviction.policies import load_policy
from streamchat.cache.eviction.policy import CacheView, Cut, Retention, Run, merged_runs, runs_without, starts_after
from streamchat.cache.fed_tokens import FedTokens
from streamchat.cache.form import new_form
from streamchat.cache.history import CacheHistory
from streamchat.cache.layers.codes import CacheDtype
from streamchat.cache.layers.fronts import evict_slots, rebase
from streamchat.cache.layers.layer import StreamingLayer
from streamchat.cache.layers.select import is_mixed, streaming_layer
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.room import quarter_of_room

# up to this position the phase error in float32 stays below 1e-3 of the logits' spread
POSITION_LIMIT = 4096


class StreamingCache(DynamicCache):
    """Attention sinks + pinned tokens + recent window (StreamingLLM, arXiv:2309.17453), for one token stream.

    Differences from the paper: the window stays in place and the sinks move up to it, which gives the same relative
    positions at a cost that does not depend on the window; whole turns can be evicted at once.

    Use it under a `StreamingHook`, which evicts before each forward and assigns positions. Without one, `update` raises
    `CacheError` instead of exceeding the budget.

    Args:
        config: The model's configuration.
        fit: How this model's cached tensors carry positions (`fit_positions`).
        cache_size: The budget in tokens: sinks + pinned + window. No layer ever exceeds it.
        num_sink_tokens: Number of tokens at the start of the stream that are never evicted.
        options: How to evict.
        dtype: The dtype of the cached keys and values, or `torch.int8` or `torch.int4` for codes with scales; a pair
            for keys and values; None for that of the model.

    Raises:
        ConfigError: The sizes are impossible.
        UnsupportedModelError: A layer of the model's cache is not supported.
    """

    def __init__(
        self,
        config: Any,
        fit: PositionFit,
        *,
        cache_size: int,
        num_sink_tokens: int = 4,
        options: EvictionOptions | None = None,
        dtype: CacheDtype | None = None,
    ) -> None:
        if not 0 <= num_sink_tokens < cache_size:
            raise ConfigError(
                f"num_sink_tokens = {num_sink_tokens} does not fit into cache_size = {cache_size}; it must be between "
                f"0 and {cache_size - 1}"
            )
        super().__init__(config=config)
        self.position_limit = min(fit.position_limit or 1 << 62, max(POSITION_LIMIT, 2 * cache_size))
        if cache_size > self.position_limit:
            raise ConfigError(
                f"cache_size = {cache_size} is too large: this model can use {self.position_limit} "
                f"positions{fit.limit_reason}; cache_size must be at most {self.position_limit}"
            )
        self.fit = fit
        self.cache_size = cache_size
        self.dtype = dtype
        """The dtype of the cached keys and values; None for that of the model."""
        self.num_sink_tokens = num_sink_tokens
        self.pins: tuple[Run, ...] = ()
        """Ascending runs of log indices that are never evicted; see `pin`."""
        self.recalled: tuple[Run, ...] = ()
        """Ascending runs of log indices that are not evicted until they are replaced by others: evicted turns that were
        paged in for the newest message."""
        self.options = options or EvictionOptions()
        policy = self.options.policy
        self.policy = load_policy(policy) if isinstance(policy, str) else policy
        self.ledger = Ledger()
        self.turn_starts: list[int] = []
        self.compression_count = 0
        self.form = new_form()
        """Identifies the contents of the slots."""
        self._plan: TurnPlan | None = None
        if len(fit.layers) != len(self.layers):
            raise CacheError(
                f"the fit has {len(fit.layers)} layers, but this model's cache has {len(self.layers)}; measure this "
                "model with choose_fit"
            )
        for i, layer in enumerate(self.layers):
            self.layers[i] = streaming_layer(i, layer, config, fit.layers[i], cache_size, dtype)
        self._last = max(i for i, layer in enumerate(self.layers) if isinstance(layer, StreamingLayer))
        self.croppable = all(isinstance(layer, StreamingLayer) and not is_mixed(layer) for layer in self.layers)
        """Whether the newest tokens can be removed: not with recurrent states, which cannot be rewound."""
        self.fed_tokens: FedTokens | None = None
        """All ids fed so far; None unless a user of the cache needs them."""
        self.reports_stream_length = False
        """Let `get_seq_length` count all tokens of the stream, as `generate` needs it outside of forwards."""
        self._pending: Tensor | None = None
        self.history: CacheHistory | None = None
        """Records changes so that they can be undone; None unless a user of the cache needs that."""

    # --- contents ---------------------------------------------------------------------------------------------

    @property
    def streaming_layers(self) -> list[StreamingLayer]:
        """The layers with keys and values, in order; purely recurrent ones are left out."""
        return [layer for layer in self.layers if isinstance(layer, StreamingLayer)]

    @property
    def lengths(self) -> list[int]:
        """The actual length of every layer, read from its key tensor."""
        return [0 if layer.keys is None else layer.keys.shape[-2] for layer in self.streaming_layers]

    @property
    def length(self) -> int:
        """Cached tokens, according to the ledger."""
        return len(self.ledger)

    @property
    def tokens_evicted(self) -> int:
        """Tokens of the current stream (without undone ones) that are no longer cached."""
        return self.ledger.next_index - self.length

    @property
    def retention(self) -> Retention:
        """The tokens that are never evicted."""
        pins = tuple(merged_runs([*self.pins, *self.recalled])) if self.recalled else self.pins
        return Retention(self.cache_size, self.num_sink_tokens, pins)

    @property
    def prefix(self) -> int:
        """Slots at the front that are never evicted: sinks, and pinned tokens directly after them."""
        return self.retention.prefix(self.ledger)

    @property
    def num_retained(self) -> int:
        """Cached tokens that are never evicted."""
        return self.retention.retained_count(self.ledger)

    @property
    def next_position(self) -> int:
        """Absolute position of the next token."""
        return self.streaming_layers[0].next_position

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of cached tokens, or of all tokens of the stream if `reports_stream_length` is set.

        It is the length of that layer: within a forward, updated layers are ahead of the others (Llama 4 asks in each).
        """
        if self.reports_stream_length:
            return self.ledger.next_index
        layer = self.layers[layer_idx]
        return (layer if isinstance(layer, StreamingLayer) else self.streaming_layers[0]).length

    @property
    def kv_bytes(self) -> int:
        """Bytes of all buffers; constant after allocation."""
        return sum(layer.storage_bytes for layer in self.streaming_layers)

    @property
    def token_bytes(self) -> int:
        """Bytes per token over all layers; 0 before the first forward."""
        return sum(layer.token_bytes for layer in self.streaming_layers)

    # --- control ----------------------------------------------------------------------------------------------

    def pin(self, first: int, stop: int) -> None:
        """Never evict the cached tokens with log indices `[first, stop)`.

        Older tokens can still be evicted; the pinned ones then follow the sinks.

        Raises:
            ConfigError: No room would be left for a window.
        """
        pins = tuple(merged_runs([*self.pins, (first, stop)]))
        retained = Retention(self.cache_size, self.num_sink_tokens, pins).retained_count(self.ledger)
        if retained >= self.cache_size:
            raise ConfigError(
                f"{retained} sink and pinned tokens leave no room for a window in cache_size = {self.cache_size}; pin "
                f"less or set cache_size to at least {retained + 1}"
            )
        self.pins = pins

    def unpin(self, first: int, stop: int) -> None:
        """Make the tokens with log indices `[first, stop)` evictable again, as the oldest of the window."""
        self.pins = tuple(runs_without(self.pins, first, stop))

    def begin_turn(self, incoming: int, reserve: int = 0) -> None:
        """Start a turn of `incoming` prompt tokens at the next token, with room for `reserve` more if possible.

        The turn's first forward evicts for it.
        """
        self.turn_starts.append(self.ledger.next_index)
        self._plan = TurnPlan(incoming, reserve)

    def make_room(self, incoming: int, why: Trigger | None = None) -> None:
        """Evict until `incoming` tokens fit, and rebase positions near the limit. Called by the hook.

        Args:
            incoming: New tokens.
            why: What they are for, if they are not fed.

        Raises:
            ChunkTooLargeError: They do not fit next to the retained tokens.
            CacheFullError: They do not fit and `on_full` is "stop".
            EvictionPlanError: The policy's plan breaks a rule.
        """
        self.discard_partial_forward()
        trigger: Trigger = "prefill" if incoming > 1 else "decode"
        want, reserve = incoming, 0
        if self._plan is not None:
            # A prompt larger than the cache comes in chunks; plan for as much of it as fits.
            room = self.cache_size - self.num_retained
            want = max(incoming, min(self._plan.incoming, room))
            reserve = min(self._plan.reserve, max(0, room - want))
            trigger, self._plan = "between_turns", None
        trigger = why or trigger
        if self.length + want + reserve > self.cache_size:
            view = replace(
                self._view(self.ledger, self.retention, self.turn_starts),
                incoming=want,
                reserve=reserve,
                block=self._block(),
                fetch_keys=self.unrotated_keys if self._has_keys else None,
            )
            cuts = plan_cuts(self.policy, view, evict=self.options.on_full == "evict")
            if cuts:
                self._evict(cuts, trigger)
        self._rebase_if_needed(incoming)

    def simulate_eviction(
        self, cached: Sequence[Run], next_index: int, *, budget: int, pins: Sequence[Run], turn_starts: Sequence[int]
    ) -> tuple[list[Run], list[int]]:
        """Return the runs and turn starts that remain of `cached` when it is evicted to fit `budget`. Changes nothing.

        Args:
            cached: Runs of log indices in some cache, possibly one with a larger budget.
            next_index: Log index of the next token.
            budget: Tokens; at most `cache_size`.
            pins: Runs that must remain. With the sinks they fit into the budget.
            turn_starts: Ascending log indices at which turns start.
        """
        ledger = Ledger(list(cached), next_index)
        starts = [start for start in turn_starts if ledger.count_in(start, start + 1)]
        if len(ledger) <= budget:
            return ledger.runs, starts
        retention = Retention(budget, self.num_sink_tokens, tuple(pins))
        cuts = plan_cuts(self.policy, self._view(ledger, retention, starts))
        dropped = [run for cut in cuts for run in ledger.evict(cut.at, cut.count)]
        return ledger.runs, starts_after(starts, dropped, retention, ledger)

    def _view(self, ledger: Ledger, retention: Retention, turn_starts: Sequence[int]) -> CacheView:
        retained = tuple(retention.retained_slots(ledger))
        return CacheView(
            ledger, retained, retention.cache_size, turn_starts=tuple(turn_starts), clean_cut=self.options.clean_cut
        )

    @property
    def _has_keys(self) -> bool:
        """Whether the layers hold the tokens of the ledger."""
        return self.length > 0

    def unrotated_keys(self, first: int, stop: int) -> Iterator[Tensor]:
        """Yield each layer's keys of slots `[first, stop)`; see `StreamingLayer.unrotated_keys`."""
        for layer in self.streaming_layers:
            yield layer.unrotated_keys(first, stop)

    def discard_partial_forward(self) -> None:
        """Truncate all layers to the ledger's length: a forward that failed halfway leaves some of them longer."""
        length = self.length
        for layer in self.streaming_layers:
            if layer.length > length:
                layer.truncate(length)

    def replace_not_finite(self) -> None:
        """Replace NaN and infinities in the buffers by 0.

        A captured step reads free slots, too: their weight is 0, but 0 times NaN is NaN.
        """
        with torch.inference_mode(False), torch.no_grad():
            for layer in self.streaming_layers:
                layer.replace_not_finite()

    def crop_from(self, index: int) -> int:
        """Remove all tokens from log index `index` on, and forget that they were fed; returns how many were cached.

        Tokens that were evicted to make room for them do not come back.
        """
        count = self.length - self.ledger.slot_from(index)
        self.crop_newest(count)
        self.ledger.next_index = index
        if self.fed_tokens is not None:
            self.fed_tokens.truncate(index)
        self.turn_starts = [start for start in self.turn_starts if start < index]
        self.unpin(index, max((stop for _, stop in self.pins), default=index))
        self._plan = None
        return count

    def crop_newest(self, count: int) -> None:
        """Remove the newest `count` tokens from every layer.

        Raises:
            CacheError: A layer has a recurrent state (see `croppable`).
        """
        if count <= 0:
            return
        if not self.croppable:
            raise CacheError(
                f"the newest {count} tokens cannot be removed: this model has a recurrent state that cannot be rewound"
            )
        self.ledger.crop(count)
        self.discard_partial_forward()
        if self.fed_tokens is not None:
            self.fed_tokens.truncate(self.ledger.next_index)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch for beam search."""
        super().reorder_cache(cast(torch.LongTensor, beam_idx))
        if self.fed_tokens is not None:
            self.fed_tokens.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        super().batch_repeat_interleave(repeats)
        if self.fed_tokens is not None:
            self.fed_tokens.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        super().batch_select_indices(indices)
        if self.fed_tokens is not None:
            self.fed_tokens.select(indices)

    # --- DynamicCache -----------------------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append one layer's states; the ledger advances with the last layer."""
        result: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == self._last:
            self.advance(key_states.shape[-2])
        return result

    def crop(self, tokens_to_remove: int) -> None:
        """Crop: negative = number of tokens to drop, positive = length to keep (as in transformers < 5.17)."""
        if tokens_to_remove < 0:
            self.crop_newest(-tokens_to_remove)
        elif tokens_to_remove > 0:
            self.crop_newest(max(0, self.length - tokens_to_remove))

    def reset(self) -> None:
        """Empty the cache; sizes, options and buffers stay."""
        for layer in self.layers:
            # recurrent states are zeroed in place, and may be inference tensors
            with torch.inference_mode(type(layer) is not StreamingLayer):
                layer.reset()
        self.ledger.clear()
        if self.fed_tokens is not None:
            self.fed_tokens.clear()
        self.turn_starts.clear()
        self.pins, self.recalled, self.compression_count = (), (), 0
        self.form = new_form()
        self._plan = None
        if self.history is not None:
            self.history.clear()

    # --- internals --------------------------------------------------------------------------------------------

    def _cut(self, cut: Cut) -> list[Run]:
        """Evict the slots of `cut` from layers and ledger; return their log indices."""
        left = Ledger(list(self.ledger.runs), self.ledger.next_index)
        dropped = left.evict(cut.at, cut.count)
        with torch.inference_mode(False), torch.no_grad():
            if self.history is not None:
                self.history.before_cut(cut.at, tuple(dropped))
            self._evict_from_layers(cut.at, cut.count)
        self.ledger = left
        return dropped

    def _evict_from_layers(self, prefix: int, count: int) -> None:
        evict_slots(self.streaming_layers, prefix, count)

    def note_input_ids(self, ids: Tensor | None) -> None:
        """Note the (batch, n) ids that the next forward feeds; None for embeddings. Called by the hook."""
        self._pending = ids

    def advance(self, count: int) -> None:
        """Advance the ledger by `count`; for callers that bypass `update`."""
        self.ledger.append(count)
        if self.fed_tokens is not None:
            if self._pending is None:
                self.fed_tokens.known = False
            else:
                self.fed_tokens.append(self._pending)
            self._pending = None

    def _block(self) -> int:
        """Return the minimum number of tokens per token-level eviction."""
        return quarter_of_room(self.cache_size, self.num_retained, self.options.block)

    def _rebase_if_needed(self, incoming: int) -> None:
        if self.length and self.next_position + incoming > self.position_limit:
            self.rebase_positions()

    def rebase_positions(self, to: int = 0) -> None:
        """Move the positions of all layers so that they start at `to`."""
        with torch.inference_mode(False), torch.no_grad():
            if self.history is not None:
                self.history.before_rebase()
            rebase(self.streaming_layers, to)
        self.form = self.form.rebased()

    def _evict(self, cuts: list[Cut], trigger: Trigger) -> None:
        if self.options.before_evict is not None:
            self.options.before_evict()
        before = self.length
        dropped: list[Run] = []
        for cut in cuts:
            dropped += self._cut(cut)
        self.compression_count += 1
        self.turn_starts = starts_after(self.turn_starts, dropped, self.retention, self.ledger)
        if self.options.on_evict is not None:
            self.options.on_evict(Eviction(tuple(dropped), before, self.length, trigger))
