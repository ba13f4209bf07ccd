"""A conversation on one persistent cache: runs turns, evicts, rolls back. Owned by one thread."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError, TurnError
from streamchat.base.formatting import plural
from streamchat.cache.eviction.options import EvictionOptions
from streamchat.cache.eviction.policy import Run
from streamchat.cache.hook import StreamingHook
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.positions.strategy import make_cache
from streamchat.config.settings import Settings
from streamchat.conversation.encoding import ChatEncoder, EncodedTurn
from streamchat.conversation.ends import EndWatch, find_ends
from streamchat.conversation.eviction_events import clean_cut, eviction_event
from streamchat.conversation.feeder import Feeder
from streamchat.conversation.fitting import unpinned_notice
from streamchat.conversation.log import TokenLog, TurnRecord, TurnStart
from streamchat.conversation.pins import SMALLEST_WINDOW, set_pin
from streamchat.conversation.reasoning import learn_reasoning
from streamchat.conversation.reply import ReplyText
from streamchat.conversation.rollback import REACH, Rollback, UndoResult, free_memory, is_out_of_memory
from streamchat.conversation.sampling import Sampler, new_generator
from streamchat.conversation.segments import segments
from streamchat.conversation.template.chat_format import ChatFormat
from streamchat.conversation.template.reply_shape import learn_shape

# Token-level eviction inside a long reply works in blocks, which divides its cost.
EVICTION_BLOCK = 32


class Cancelled(Exception):
    """The user stopped the turn during prefill."""


@dataclass
class TurnOutcome:
    """How a turn ended."""

    turn: int
    reply: str
    finish_reason: ev.FinishReason
    prompt_tokens: int
    new_tokens: int
    ttft_s: float | None
    decode_tps: float | None
    rolled_back: bool = False
    message: str = ""


class Conversation:
    """Model, cache, token log and transcript, kept consistent.

    The cache contains exactly the ids of the rendered conversation, except for those evicted. Each turn feeds only its
    own new ids. Stopping a turn keeps the text that was shown and closes the turn. A turn that has shown nothing, or
    that failed, is rolled back.

    Args:
        model: A causal LM in eval mode.
        tokenizer: Its tokenizer.
        fit: `choose_fit(model)`.
        chat_format: The format of turns.
        settings: The current settings.
        cache_size: The cache budget in tokens.
        emit: Called with every event, on the caller's thread.

    Raises:
        ConfigError: The system prompt leaves no room for a window.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        fit: PositionFit,
        chat_format: ChatFormat,
        settings: Settings,
        cache_size: int,
        emit: Callable[[ev.Event], None],
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self._emit = emit
        self.log = TokenLog()
        self.cache = make_cache(
            model,
            fit,
            cache_size=cache_size,
            num_sink_tokens=settings.num_sink_tokens,
            options=EvictionOptions(
                policy=settings.evict,
                on_full=settings.on_full,
                block=EVICTION_BLOCK,
                clean_cut=lambda index: clean_cut(index, self.log, tokenizer),
                on_evict=lambda eviction: self._emit(eviction_event(eviction, self.log, self.cache, self.state())),
            ),
        )
        self._feeder = Feeder(model, self.cache, self.log)
        self._device = self._feeder.device
        self.rollback = Rollback(self.cache, self.log, self._feeder)
        self.cache.options.before_evict = self.rollback.before_evict
        self._generator = new_generator(settings.seed, self._device)
        self._hook = StreamingHook(model, self.cache)
        self._hook.attach()
        self.ttft_s: float | None = None
        self.decode_tps: float | None = None
        self._text: ReplyText | None = None
        self.system_tokens = 0
        """Length of the system block, the first of the token log."""
        self.start_over(chat_format)

    def close(self) -> None:
        """Remove the hook from the model."""
        self._hook.remove()

    def reopen(self) -> None:
        """Attach the hook to the model again after `close`."""
        self._hook.attach()

    # --- state ------------------------------------------------------------------------------------------------

    @property
    def pinned_tokens(self) -> int:
        """Tokens of the system block and of pinned turns beyond the sinks."""
        return self.cache.num_retained - min(self.cache.length, self.cache.num_sink_tokens)

    def state(self) -> ev.CacheState:
        """Return the current state of the cache, read back from its layers."""
        cache = self.cache
        length = max(cache.lengths, default=0)
        sinks = min(length, cache.num_sink_tokens)
        pinned = self.pinned_tokens
        first_kept = cache.ledger.index_at(cache.prefix)
        return ev.CacheState(
            length=length,
            cache_size=cache.cache_size,
            sinks=sinks,
            pinned=pinned,
            window=length - sinks - pinned,
            compressions=cache.compression_count,
            tokens_evicted=cache.tokens_evicted,
            tokens_seen=cache.ledger.next_index,
            kv_bytes=cache.kv_bytes,
            full_kv_bytes=cache.token_bytes * cache.ledger.next_index,
            first_visible_turn=self.log.first_turn_from(first_kept) if cache.tokens_evicted else 0,
            segments=segments(cache.ledger, self.log, sinks=cache.num_sink_tokens, pins=cache.pins),
        )

    # --- operations -------------------------------------------------------------------------------------------

    def start_over(self, chat_format: ChatFormat) -> None:
        """Clear the conversation, and prefill the system block of `chat_format`.

        Raises:
            ConfigError: The system block does not fit. Nothing has changed then.
        """
        encoder = ChatEncoder(self.tokenizer, chat_format)
        block = encoder.system_block()
        most = self.cache.cache_size - max(len(block), self.cache.num_sink_tokens)
        if most < SMALLEST_WINDOW:
            sinks, size = self.cache.num_sink_tokens, self.cache.cache_size
            least = max(len(block), sinks) + SMALLEST_WINDOW
            if len(block) > sinks:
                what = f"the system prompt ({plural(len(block), 'token')}) leaves"
                cure = "shorten it or set"
            else:
                what = f"num_sink_tokens = {sinks} leaves"
                cure = "lower it or set"
            raise ConfigError(
                f"{what} {max(0, most)} of cache_size = {size} for the conversation, and it needs "
                f"{SMALLEST_WINDOW}; {cure} cache_size to at least {least}"
            )
        self.encoder = encoder
        shape = learn_shape(self.tokenizer, encoder)
        self._ends = find_ends(self.model, self.tokenizer, shape)
        self._reasoning = learn_reasoning(self.tokenizer, shape)
        self.cache.reset()
        self.log.clear()
        self.rollback.clear()
        self.ttft_s = self.decode_tps = None
        self.system_tokens = len(block)
        if block:
            self._feeder.feed(block)
            self.cache.pin(0, len(block))

    def set_pin(self, number: int, pinned: bool) -> int:
        """Pin or unpin a turn; return the number of its cached tokens. See `pins.set_pin`."""
        return set_pin(self.cache, self.log, number, pinned)

    def reseed(self) -> None:
        """Seed the random generator from the settings, starting with the next token."""
        self._generator = new_generator(self.settings.seed, self._device)

    @property
    def rng_state(self) -> Tensor:
        """State of the random generator."""
        return self._generator.get_state()

    @rng_state.setter
    def rng_state(self, state: Tensor) -> None:
        self._generator.set_state(state)

    @property
    def shown(self) -> str:
        """The text that the running or latest reply has shown so far."""
        return "" if self._text is None else self._text.shown

    def next_logits(self) -> Tensor:
        """Return the logits (vocab_size,) after the newest token; the cache is unchanged afterwards. For checks.

        Raises:
            CacheError: The cache has a recurrent state, which cannot be cropped.
        """
        last = self.log.ids[-1]
        self.cache.crop_newest(1)
        self.log.cut(len(self.log) - 1)
        return self._feeder.forward([last])

    @contextmanager
    def muted(self, settings: Settings) -> Iterator[None]:
        """Emit no events and use `settings` inside the block. For a turn that is undone before the block ends."""
        emit, self._emit = self._emit, lambda event: None
        own, self.settings = self.settings, settings
        try:
            with self.rollback.hidden_turn():
                yield
        finally:
            self._emit, self.settings = emit, own

    def prefill_runs(self, runs: Sequence[Run], stop: int) -> int:
        """Replace the contents of the cache by these runs of the log; return the number of tokens prefilled."""
        return self._feeder.prefill_runs(runs, stop)

    def close_cut_reply(self, ids: Sequence[int]) -> None:
        """Close the newest turn, whose reply was cut off; `ids` are the reply's ids, the last of cache and log."""
        self._close_reply(self.log.turns[-1], self._read(ids), list(ids), len(self.log) - len(ids))

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the text that a reply with these ids shows."""
        return self._read(ids).shown

    def _read(self, ids: Sequence[int]) -> ReplyText:
        text, ends = self._new_text(), EndWatch(self._ends, self.tokenizer)
        for token in ids:
            ends.ended_by(token)
            text.push(token)
        text.finish()
        text.cut(ends.length)
        return text

    def _new_text(self) -> ReplyText:
        return ReplyText(self.tokenizer, self.encoder.format.stop_strings, self._reasoning)

    def run_turn(self, text: str, cancelled: Callable[[], bool], reply: str | None = None) -> TurnOutcome:
        """Prefill `text`, generate a reply, close the turn. Emits events up to, but not including, `TurnFinished`.

        Args:
            text: The user's message.
            cancelled: Called before each forward; returns whether to stop.
            reply: A given reply; None to generate one.

        Raises:
            TurnError: The turn failed and was rolled back.
        """
        started = time.perf_counter()
        number = self.log.turns[-1].number + 1 if self.log.turns else 1
        first = not self.log.turns
        if self.encoder.format.renew is not None:
            self.encoder = ChatEncoder(self.tokenizer, self.encoder.format.renew())
        encoded = self.encoder.encoded(text, first, reply, "." if first else self.log.turns[-1].reply)
        prompt = encoded.prompt
        self._refuse_if_full(number, len(prompt) + len(encoded.reply))
        at = len(self.log)
        turn = TurnRecord(number, at, at + encoded.message_start, at + encoded.reply_start, text=text)
        turn.prompt_end, turn.given = at + len(prompt), reply is not None
        before = TurnStart(self.rollback.mark(), self._generator.get_state(), self.ttft_s, self.decode_tps)
        self.log.turns.append(turn)
        try:
            self._text = None
            self.rollback.start_turn(turn, before)
            self._emit(ev.TurnStarted(number, text, len(prompt)))
            self.ttft_s = self.decode_tps = None
            reserve = min(self.settings.max_new_tokens, (self.cache.cache_size - self.cache.num_retained) // 4)
            self.cache.begin_turn(len(prompt), reserve if reply is None else len(encoded.reply))
            logits = self._prefill(turn, prompt, cancelled)
            if reply is None:
                outcome = self._generate_reply(turn, logits, started, len(prompt), cancelled)
            else:
                outcome = self._feed_reply(turn, reply, encoded)
        except BaseException as error:
            self.undo()
            if isinstance(error, Cancelled):
                return TurnOutcome(number, "", "cancelled", len(prompt), 0, None, None, rolled_back=True)
            if is_out_of_memory(error):
                free_memory(self._device)
                raise TurnError(
                    f"out of memory in turn {number} ({len(prompt)} tokens); it was rolled back; try a shorter message "
                    "or a smaller --cache-size"
                ) from error
            raise
        if outcome.rolled_back:
            self.undo()
        else:
            self.rollback.end_turn()
        return outcome

    def undo(self, *, restore_rng: bool = True) -> UndoResult:
        """Undo the newest turn.

        Args:
            restore_rng: Also restore the random generator, so that the same message gets the same reply.

        Raises:
            ConfigError: Nothing to undo, or the turn is too old.
        """
        if not self.log.turns:
            raise ConfigError("nothing to undo yet")
        turn = self.log.turns[-1]
        if turn.before is None:
            raise ConfigError(f"turn {turn.number} is too old to undo; only the last {REACH} turns can be undone")
        result = self.rollback.undo(turn)
        if restore_rng and turn.before.generator is not None:
            self._generator.set_state(turn.before.generator)
        self.ttft_s, self.decode_tps = turn.before.ttft_s, turn.before.decode_tps
        if result.unpinned:
            self._emit(ev.Notice(unpinned_notice(result.unpinned, self.cache.cache_size)))
        if result.missing:
            self._emit(
                ev.Notice(
                    f"Out of memory: {result.missing:,} of {result.missing + self.cache.length:,} tokens could not be "
                    "restored to the cache; use /clear, or resume with a smaller --cache-size"
                )
            )
        return result

    def _refuse_if_full(self, number: int, prompt_tokens: int) -> None:
        """With `on_full = "stop"`, raise `TurnError` without room for the prompt, one reply token and the close."""
        size = self.cache.cache_size
        needed, free = prompt_tokens + 1 + len(self.encoder.close()), size - self.cache.length
        if self.settings.on_full == "stop" and needed > free:
            raise TurnError(
                f"the cache is full: turn {number} needs at least {needed} tokens, and {free} of {size} are free; "
                "use /clear to start over, or on_full = evict to drop old turns"
            )

    # --- inside a turn ----------------------------------------------------------------------------------------

    def _prefill(self, turn: TurnRecord, prompt: list[int], cancelled: Callable[[], bool]) -> Tensor:
        def after_chunk(done: int) -> None:
            if done:
                self._emit(ev.PrefillProgress(turn.number, done, len(prompt)))
            if done < len(prompt) and cancelled():
                raise Cancelled

        return self._feeder.feed(prompt, after_chunk)

    def _generate_reply(
        self, turn: TurnRecord, logits: Tensor, started: float, prompt_tokens: int, cancelled: Callable[[], bool]
    ) -> TurnOutcome:
        settings = self.settings
        sampler = Sampler(settings, self._device, self._generator)
        text = self._text = self._new_text()
        ends = EndWatch(self._ends, self.tokenizer)
        reply_start = len(self.log)
        ids: list[int] = []
        reason: ev.FinishReason = "length"
        first_at = last_at = None
        limit = settings.max_new_tokens
        if settings.on_full == "stop":
            limit = min(limit, self.cache.cache_size - self.cache.length - len(self.encoder.close()))
        while len(ids) < limit:
            if cancelled():
                reason = "cancelled"
                break
            if ids:
                logits = self._feeder.forward(ids[-1:])
            token = sampler(self._require_finite(logits), self._recent(sampler.window))
            last_at = time.perf_counter()
            if first_at is None:
                first_at = last_at
                self.ttft_s = first_at - started
            else:
                self.decode_tps = len(ids) / (last_at - first_at)
            if ends.ended_by(token):
                reason = "stop"
                break
            ids.append(token)
            self._show(turn, text.push(token))
            if text.stopped:
                reason = "stop"
                break
        self._show(turn, text.finish())
        text.cut(ends.length)
        rolled_back = reason == "cancelled" and not text.shown
        if not rolled_back:
            self._close_reply(turn, text, ids, reply_start)
        return TurnOutcome(
            turn.number, text.shown, reason, prompt_tokens, len(ids), self.ttft_s, self.decode_tps, rolled_back
        )

    def _close_reply(self, turn: TurnRecord, text: ReplyText, ids: list[int], reply_start: int) -> None:
        """Cut log and cache to exactly what was shown, and close the message."""
        kept = text.kept()
        fed = len(self.log) - reply_start
        if kept.tokens < fed:
            self._truncate(reply_start + kept.tokens)
        before = text.written.removesuffix(kept.rest)
        self._feeder.feed(ids[fed : kept.tokens] + self.encoder.close(before, kept.rest))
        turn.end, turn.reply = len(self.log), text.shown

    def _feed_reply(self, turn: TurnRecord, reply: str, encoded: EncodedTurn) -> TurnOutcome:
        """Feed a given reply."""
        self._show(turn, reply)
        if encoded.reply:
            self._require_finite(self._feeder.feed(encoded.reply))
        turn.end, turn.reply = len(self.log), reply
        return TurnOutcome(turn.number, reply, "stop", len(encoded.prompt), 0, None, None)

    def _show(self, turn: TurnRecord, text: str) -> None:
        if text:
            self._emit(ev.TextDelta(turn.number, text))

    def _require_finite(self, logits: Tensor) -> Tensor:
        # the maximum is NaN if any logit is NaN, and infinite if one is +inf
        if not math.isfinite(float(logits.max())):
            raise TurnError(
                "the model produced NaN/inf logits; the turn was rolled back, and --dtype float32 usually helps"
            )
        return logits

    def _recent(self, window: int) -> list[int]:
        control = self.encoder.control_ids
        return [token for token in self.log.ids[-window:] if token not in control] if window else []

    def _truncate(self, index: int) -> None:
        """Cut log and cache at log index `index`, where a stop string ended the reply."""
        if self.cache.croppable:
            self.cache.crop_from(index)
            self.log.cut(index)
        else:
            self.log.cut(index)
            self._feeder.rebuild(index)
