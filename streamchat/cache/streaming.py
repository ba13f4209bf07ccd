"""The cache of an endless conversation: a `DynamicCache` that never holds more than its budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import DynamicCache

from streamchat.base.errors import CacheError, ConfigError
from streamchat.cache.eviction.ledger import Ledger
from streamchat.cache.eviction.policy import Cut, Retention, Run, merged_runs, plan_cuts, runs_without
from streamchat.cache.fed_tokens import SeenIds
from streamchat.cache.layers.layer import StreamingLayer
from streamchat.cache.layers.select import is_mixed, streaming_layer
from streamchat.cache.positions.fit import PositionFit

# float32 phase error at this distance from 0 stays below 1e-3 of a logit's spread (shared measurements in docs)
POSITION_LIMIT = 4096

Trigger = Literal["between_turns", "prefill", "decode"]


@dataclass(frozen=True)
class Eviction:
    """One compression: tokens that left every layer at once."""

    dropped: tuple[tuple[int, int], ...]
    """Runs `[first, stop)` of token log indices."""
    length_before: int
    length_after: int
    trigger: Trigger

    @property
    def count(self) -> int:
        """Tokens dropped."""
        return sum(stop - first for first, stop in self.dropped)


@dataclass
class TurnPlan:
    """What the cache is told about the turn that begins."""

    incoming: int
    reserve: int


@dataclass
class EvictionOptions:
    """How room is made; the defaults are the paper's rolling window."""

    by: Literal["turns", "tokens"] = "tokens"
    """Whole turns first (where turn starts were announced), or always the oldest tokens."""
    on_full: Literal["evict", "stop"] = "evict"
    """What happens when the budget is reached: room is made, or a forward that does not fit raises `CacheFullError`."""
    block: int = 1
    """Token-level evictions drop at least this many."""
    clean_cut: Callable[[int], int] | None = None
    """Token log index -> the same or a later one at which the window may begin."""
    before_evict: Callable[[], None] | None = field(default=None, repr=False)
    """Called before anything is dropped, with the cache whole."""
    on_evict: Callable[[Eviction], None] | None = field(default=None, repr=False)
    """Called after every eviction."""


class StreamingCache(DynamicCache):
    """Attention sinks + pinned tokens + recent window (StreamingLLM, arXiv:2309.17453), for one token stream.

    Differences from the paper: the window stays in place and the sinks move up to it, which gives the same position
    differences at a cost that does not depend on the window; whole turns can leave at once.

    Use it under a `StreamingHook`, which makes room before each forward and hands out positions. Without one,
    `update` raises `CacheError` instead of growing past the budget.

    Args:
        config: The model's configuration.
        fit: How this model's cached tensors carry positions (`fit_positions`).
        cache_size: The budget in tokens: sinks + pinned + window. No layer ever holds more.
        num_sink_tokens: The first tokens of the stream, never evicted.
        options: How room is made.

    Raises:
        ConfigError: The sizes are impossible.
        UnsupportedModelError: A layer of the model's cache cannot be served.
    """

    def __init__(
        self,
        config: Any,
        fit: PositionFit,
        *,
        cache_size: int,
        num_sink_tokens: int = 4,
        options: EvictionOptions | None = None,
    ) -> None:
        if not 0 <= num_sink_tokens < cache_size:
            raise ConfigError(
                f"num_sink_tokens = {num_sink_tokens} does not fit into cache_size = {cache_size}; it must be from 0 "
                f"to {cache_size - 1}"
            )
        super().__init__(config=config)
        self.position_limit = min(fit.position_limit or 1 << 62, max(POSITION_LIMIT, 2 * cache_size))
        if cache_size > self.position_limit:
            raise ConfigError(
                f"cache_size = {cache_size} is more than the {self.position_limit} positions that this model "
                f"represents{fit.limit_reason}; it must be at most {self.position_limit}"
            )
        self.fit = fit
        self.cache_size = cache_size
        self.num_sink_tokens = num_sink_tokens
        self.pins: tuple[Run, ...] = ()
        """Runs of log indices that are never evicted, ascending; see `pin`."""
        self.options = options or EvictionOptions()
        self.ledger = Ledger()
        self.turn_starts: list[int] = []
        self.compression_count = 0
        self._plan: TurnPlan | None = None
        if len(fit.layers) != len(self.layers):
            raise CacheError(
                f"fit_positions saw {len(fit.layers)} layers, and this model's cache has {len(self.layers)}"
            )
        for i, layer in enumerate(self.layers):
            self.layers[i] = streaming_layer(i, layer, config, fit.layers[i], cache_size)
        self._last = max(i for i, layer in enumerate(self.layers) if isinstance(layer, StreamingLayer))
        self.croppable = all(isinstance(layer, StreamingLayer) and not is_mixed(layer) for layer in self.layers)
        """Whether the newest tokens can be cut: not with recurrent states, which have no way back."""
        self.seen: SeenIds | None = None
        """The ids it was fed, where somebody needs them."""
        self.reports_seen = False
        """`get_seq_length` counts all tokens of the stream, as `generate` needs it outside of forwards."""
        self._pending: Tensor | None = None

    # --- what it holds ----------------------------------------------------------------------------------------

    @property
    def streaming_layers(self) -> list[StreamingLayer]:
        """The layers that hold tokens, in order; recurrent ones are not among them."""
        return [layer for layer in self.layers if isinstance(layer, StreamingLayer)]

    @property
    def lengths(self) -> list[int]:
        """The actual length of every layer, read from its key tensor."""
        return [0 if layer.keys is None else layer.keys.shape[-2] for layer in self.streaming_layers]

    @property
    def length(self) -> int:
        """Tokens held, by the ledger."""
        return len(self.ledger)

    @property
    def tokens_evicted(self) -> int:
        """Tokens of the stream, as far as it was not taken back, that left the cache."""
        return self.ledger.next_index - self.length

    @property
    def retention(self) -> Retention:
        """What never leaves."""
        return Retention(self.cache_size, self.num_sink_tokens, self.pins)

    @property
    def prefix(self) -> int:
        """Slots at the front that are never evicted: sinks, and pinned tokens right behind them."""
        return self.retention.prefix(self.ledger)

    @property
    def kept(self) -> int:
        """Tokens held that are never evicted."""
        return self.retention.kept_count(self.ledger)

    @property
    def next_position(self) -> int:
        """Absolute position of the next token."""
        return self.streaming_layers[0].next_position

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held now; all tokens of the stream where `reports_seen` is set.

        Of that very layer: within a forward, layers that had their update are ahead of those that had not (Llama 4
        asks in each).
        """
        if self.reports_seen:
            return self.ledger.next_index
        layer = self.layers[layer_idx]
        return (layer if isinstance(layer, StreamingLayer) else self.streaming_layers[0]).length

    @property
    def kv_bytes(self) -> int:
        """Bytes of all allocated buffers; constant once allocated."""
        return sum(layer.storage_bytes for layer in self.streaming_layers)

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes over all layers; 0 before the first forward."""
        return sum(layer.token_bytes for layer in self.streaming_layers)

    # --- what the owner says ----------------------------------------------------------------------------------

    def pin(self, first: int, stop: int) -> None:
        """Keep the tokens with log indices `[first, stop)`, as far as they are held, for good.

        What is older than them can still leave; they then stand behind the sinks.

        Raises:
            ConfigError: Nothing would be left for a window.
        """
        pins = tuple(merged_runs([*self.pins, (first, stop)]))
        kept = Retention(self.cache_size, self.num_sink_tokens, pins).kept_count(self.ledger)
        if kept >= self.cache_size:
            raise ConfigError(
                f"{kept} sink and pinned tokens do not leave room for a window in cache_size = {self.cache_size}; pin "
                f"less or set cache_size to at least {kept + 1}"
            )
        self.pins = pins

    def unpin(self, first: int, stop: int) -> None:
        """Let the tokens with log indices `[first, stop)` leave again, as the oldest of the window."""
        self.pins = tuple(runs_without(self.pins, first, stop))

    def begin_turn(self, incoming: int, reserve: int = 0) -> None:
        """A turn of `incoming` prompt tokens begins with the next token; room for `reserve` more is wanted.

        The room is made at the turn's first forward, oldest whole turns first.
        """
        self.turn_starts.append(self.ledger.next_index)
        self._plan = TurnPlan(incoming, reserve)

    def make_room(self, incoming: int) -> None:
        """Evict what is due so that `incoming` tokens fit, and rebase positions that run too far. Called by the hook.

        Raises:
            ChunkTooLargeError: They do not fit beside the prefix.
        """
        self.discard_partial_forward()
        trigger: Trigger = "prefill" if incoming > 1 else "decode"
        want, reserve = incoming, 0
        if self._plan is not None:
            # A prompt larger than the cache comes in chunks; as much as can be is announced.
            room = self.cache_size - self.kept
            want = max(incoming, min(self._plan.incoming, room))
            reserve = min(self._plan.reserve, max(0, room - want))
            trigger, self._plan = "between_turns", None
        cuts = plan_cuts(
            self.ledger,
            self.retention,
            want,
            reserve=reserve,
            turn_starts=self._cuttable(self.turn_starts),
            block=self._block(),
            clean_cut=self.options.clean_cut,
            evict=self.options.on_full == "evict",
        )
        if cuts:
            self._evict(cuts, trigger)
        self._keep_positions_small(incoming)

    def fitted(
        self, held: Sequence[Run], next_index: int, *, budget: int, pins: Sequence[Run], turn_starts: Sequence[int]
    ) -> tuple[list[Run], list[int]]:
        """What eviction would leave of `held` so that it fits into `budget`: runs and turn starts. Changes nothing.

        Args:
            budget: Tokens; at most `cache_size`.
            held: Runs of log indices that some cache held, perhaps one with a larger budget.
            next_index: Log index of the next token.
            pins: Runs that must stay. With the sinks they fit into the budget.
            turn_starts: Log indices, ascending, at which whole turns can be cut.
        """
        ledger = Ledger(list(held), next_index)
        starts = [start for start in turn_starts if ledger.count_in(start, start + 1)]
        if len(ledger) <= budget:
            return ledger.runs, starts
        retention = Retention(budget, self.num_sink_tokens, tuple(pins))
        cuttable, clean_cut = self._cuttable(starts), self.options.clean_cut
        cuts = plan_cuts(ledger, retention, 0, turn_starts=cuttable, clean_cut=clean_cut)
        dropped = [run for cut in cuts for run in ledger.evict(cut.at, cut.count)]
        return ledger.runs, [start for start in starts if start >= dropped[-1][1]]

    def _cuttable(self, turn_starts: Sequence[int]) -> Sequence[int]:
        return turn_starts if self.options.by == "turns" else ()

    def discard_partial_forward(self) -> None:
        """Make all layers as long as the ledger says: a forward that failed half-way leaves some ahead."""
        for layer in self.streaming_layers:
            if layer.length > self.length:
                layer.truncate(self.length)

    def forget_from(self, index: int) -> int:
        """Cut all tokens from log index `index` on, as if they had never been fed; returns how many were held.

        Older tokens that were evicted to make room for them do not come back.
        """
        held = self.length - self.ledger.slot_from(index)
        self.crop_newest(held)
        self.ledger.next_index = index
        if self.seen is not None:
            self.seen.cut(index)
        self.turn_starts = [start for start in self.turn_starts if start < index]
        self.unpin(index, max((stop for _, stop in self.pins), default=index))
        self._plan = None
        return held

    def crop_newest(self, count: int) -> None:
        """Cut the newest `count` tokens in every layer.

        Raises:
            CacheError: A layer has a recurrent state (see `croppable`).
        """
        if count <= 0:
            return
        if not self.croppable:
            raise CacheError(
                f"the newest {count} tokens cannot be cut: this model keeps a recurrent state beside its cache"
            )
        self.ledger.crop(count)
        self.discard_partial_forward()
        if self.seen is not None:
            self.seen.cut(self.ledger.next_index)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch for beam search."""
        super().reorder_cache(cast(torch.LongTensor, beam_idx))
        if self.seen is not None:
            self.seen.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        super().batch_repeat_interleave(repeats)
        if self.seen is not None:
            self.seen.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        super().batch_select_indices(indices)
        if self.seen is not None:
            self.seen.select(indices)

    # --- DynamicCache -----------------------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append one layer's states; the ledger follows when the last layer has them."""
        result: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == self._last:
            self.count_read(key_states.shape[-2])
        return result

    def crop(self, tokens_to_remove: int) -> None:
        """Cut the newest tokens: minus their number, or the length that shall stay (as transformers < 5.17)."""
        if tokens_to_remove < 0:
            self.crop_newest(-tokens_to_remove)
        elif tokens_to_remove > 0:
            self.crop_newest(max(0, self.length - tokens_to_remove))

    def reset(self) -> None:
        """Empty everything; sizes, options and buffers are kept."""
        for layer in self.layers:
            # recurrent states are zeroed in place, and are inference tensors where the model ran in that mode
            with torch.inference_mode(type(layer) is not StreamingLayer):
                layer.reset()
        self.ledger.clear()
        if self.seen is not None:
            self.seen.clear()
        self.turn_starts.clear()
        self.pins, self.compression_count = (), 0
        self._plan = None

    # --- inside -----------------------------------------------------------------------------------------------

    def _evict_from_layers(self, prefix: int, count: int) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for layer in self.streaming_layers:
                layer.evict(prefix, count)

    def announce(self, ids: Tensor | None) -> None:
        """The next forward feeds these (batch, n) ids; None for embeddings. Called by the hook."""
        self._pending = ids

    def count_read(self, count: int) -> None:
        """All layers have got `count` new tokens: the ledger follows. For those who feed the layers themselves."""
        self.ledger.append(count)
        if self.seen is not None:
            if self._pending is None:
                self.seen.known = False
            else:
                self.seen.append(self._pending)
            self._pending = None

    def _block(self) -> int:
        """How many tokens a token-level eviction drops at least."""
        return min(self.options.block, max(1, (self.cache_size - self.kept) // 4))

    def _keep_positions_small(self, incoming: int) -> None:
        if self.length and self.next_position + incoming > self.position_limit:
            self.set_positions_back()

    def set_positions_back(self) -> None:
        """Move the positions of all layers so that they begin at 0."""
        with torch.inference_mode(False), torch.no_grad():
            for layer in self.streaming_layers:
                layer.rebase()

    def _evict(self, cuts: list[Cut], trigger: Trigger) -> None:
        if self.options.before_evict is not None:
            self.options.before_evict()
        before = self.length
        dropped: list[Run] = []
        for cut in cuts:
            self._evict_from_layers(cut.at, cut.count)
            dropped += self.ledger.evict(cut.at, cut.count)
        self.compression_count += 1
        # Turns that lost their first token cannot be cut at any more. What is pinned has left the order of things.
        self.turn_starts = [start for start in self.turn_starts if start >= dropped[-1][1]]
        if self.options.on_evict is not None:
            self.options.on_evict(Eviction(tuple(dropped), before, self.length, trigger))
