"""A conversation on one persistent cache: runs turns, evicts, rolls back. Owned by one thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from streamchat.base import events as ev
from streamchat.base.errors import CacheFullError, ConfigError, TurnError
from streamchat.base.out_of_memory import is_out_of_memory
from streamchat.cache.eviction.options import EvictionOptions
from streamchat.cache.hook import StreamingHook
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.positions.strategy import make_cache
from streamchat.config.settings import Settings
from streamchat.conversation.auto_recall import AutoRecall
from streamchat.conversation.cache_view import cache_view
from streamchat.conversation.dry import dry_penalty
from streamchat.conversation.encoding import ChatEncoder, EncodedTurn
from streamchat.conversation.eviction_events import clean_cut, eviction_event
from streamchat.conversation.feeder import Feeder
from streamchat.conversation.generation import Cancelled, Generation, TurnOutcome, close_reply, require_room
from streamchat.conversation.log import Speed, TokenLog, TurnRecord, TurnStart
from streamchat.conversation.loops import LoopWatch, is_guarded
from streamchat.conversation.pins import require_window, set_pin
from streamchat.conversation.recall import FindEvicted, PagedIn, page_in_turn
from streamchat.conversation.reply import PreparedFormat, ReplyText, prepare_format
from streamchat.conversation.rollback import REACH, Rollback, UndoResult, release_memory
from streamchat.conversation.sampling import Sampler, SamplerFactory, TokenSampler, new_generator
from streamchat.conversation.speculation.speculator import Speculator
from streamchat.conversation.template.chat_format import ChatFormat
from streamchat.decode.install import record_used
from streamchat.decode.report import recorded_step
from streamchat.decode.steps import StepReport
from streamchat.store.records import CacheMark

# Token-level eviction inside a long reply works in blocks, which divides its cost.
EVICTION_BLOCK = 32


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
        sampler: Makes the sampler of each reply.

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
        sampler: SamplerFactory = Sampler,
    ) -> None:
        self.model, self.tokenizer, self.settings, self.sampler = model, tokenizer, settings, sampler
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
        self.feeder = Feeder(model, self.cache, self.log)
        self._device = self.feeder.device
        self._parameters = sum(weights.numel() for weights in model.parameters())
        self.speculator = Speculator(self.feeder)
        self.auto_recall = AutoRecall(self.feeder, tokenizer)
        self.rollback = Rollback(self.cache, self.log, self.feeder)
        self.cache.options.before_evict = self.rollback.before_evict
        self._generator = new_generator(settings.seed, self._device)
        self._hook = StreamingHook(model, self.cache)
        self._hook.attach()
        self.speed = Speed()
        """Speed of the running or latest reply."""
        self.stop_strings: tuple[str, ...] = ()
        """Texts that end a reply, besides those of the format."""
        self._text: ReplyText | None = None
        self.find_evicted: FindEvicted = lambda wanted: ()
        """Finds evicted tokens that are no longer in memory."""
        self.is_muted = False
        """Whether its newest turn is a hidden one, inside a block of `muted`."""
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

    def state(self) -> ev.CacheState:
        """Return the current state of the cache, read back from its layers."""
        return cache_view(self.cache, self.log)

    # --- operations -------------------------------------------------------------------------------------------

    def start_over(self, chat_format: ChatFormat | PreparedFormat, *, prefill: bool = True) -> None:
        """Clear the conversation, and prefill the system block of `chat_format`.

        Args:
            chat_format: The format of turns; learning a prepared one again takes no time.
            prefill: False if a saved session is restored next, with a system block of its own.

        Raises:
            ConfigError: The system block does not fit. Nothing has changed then.
        """
        if not isinstance(chat_format, PreparedFormat):
            chat_format = prepare_format(self.model, self.tokenizer, chat_format)
        block = chat_format.encoder.system_block()
        require_window(self.cache, len(block))
        self.encoder, self._reply_format = chat_format.encoder, chat_format.reply_format
        self.cache.reset()
        self.log.clear()
        self.rollback.clear()
        self.speculator.start_over()
        self.speed = Speed()
        self.system_tokens = len(block)
        if block and prefill:
            self.feeder.feed(block)
            self.cache.pin(0, len(block))

    def change_format(self, chat_format: ChatFormat) -> bool:
        """Write later turns in another format; what was fed stays as it is.

        Returns:
            Whether the start of the conversation had to change as well: it has no turns yet, and started over.

        Raises:
            ConfigError: The new start does not fit. Nothing has changed then.
        """
        later = chat_format.after(self.encoder.format)
        if "start-kept" in later.fallbacks and not self.log.turns:
            self.start_over(chat_format)
            return True
        prepared = prepare_format(self.model, self.tokenizer, later)
        self.encoder, self._reply_format = prepared.encoder, prepared.reply_format
        return False

    def set_pin(self, number: int, pinned: bool) -> int:
        """Pin or unpin a turn; return the number of its cached tokens. See `pins.set_pin`."""
        return set_pin(self.cache, self.log, number, pinned)

    def page_in(self, number: int) -> PagedIn:
        """Put an evicted turn back into the cache, pinned and without a prefill. See `page_in_turn`."""
        pins = self.cache.pins
        try:
            return page_in_turn(self.cache, self.log, number, self.find_evicted)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.cache.pins = pins
            release_memory(self._device)
            self.feeder.prefill_runs(self.cache.ledger.runs, len(self.log))  # some layers may have its tokens
            raise ConfigError(f"turn {number} cannot be paged in: not enough memory") from error

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
        return self.feeder.forward([last])

    @contextmanager
    def muted(self, settings: Settings) -> Iterator[None]:
        """Emit no events and use `settings` inside the block. For a turn that is undone before the block ends."""
        emit, self._emit = self._emit, lambda event: None
        own, self.settings = self.settings, settings
        self.is_muted = True
        try:
            with self.rollback.hidden_turn():
                yield
        finally:
            self._emit, self.settings, self.is_muted = emit, own, False

    def close_cut_reply(self, ids: Sequence[int]) -> None:
        """Close the newest turn, whose reply was cut off; `ids` are the reply's ids, the last of cache and log."""
        start = len(self.log) - len(ids)
        close_reply(self.feeder, self.encoder, self.log.turns[-1], self._read(ids), list(ids), start)

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the text that a reply with these ids shows."""
        return self._read(ids).shown

    def _read(self, ids: Sequence[int]) -> ReplyText:
        return self._new_text().read(ids)

    def _new_text(self) -> ReplyText:
        stops = (*self.encoder.format.stop_strings, *self.stop_strings)
        return ReplyText(self.tokenizer, stops, self._reply_format)

    def run_turn(
        self, text: str, cancelled: Callable[[], bool], reply: str | None = None, recall: Sequence[int] = ()
    ) -> TurnOutcome:
        """Prefill `text`, generate a reply, close the turn. Emits events up to, but not including, `TurnFinished`.

        Args:
            text: The user's message.
            cancelled: Called before each forward; returns whether to stop.
            reply: A given reply; None to generate one.
            recall: Numbers of evicted turns to recall; empty to follow the setting `auto_recall`.

        Raises:
            TurnError: The turn failed and was rolled back.
        """
        started = time.perf_counter()
        turn, encoded = self._new_turn(text, reply)
        number, prompt = turn.number, encoded.prompt
        before = TurnStart(self.rollback.mark(), self._generator.get_state(), self.speed, self.cache.recalled)
        self.log.turns.append(turn)
        try:
            generation = Generation(
                self.feeder,
                self.encoder,
                turn,
                self._new_text(),
                self.settings,
                self._emit,
                cancelled,
                started,
                self.speculator if self.settings.speculation == "auto" and self.speculator.is_supported else None,
                LoopWatch() if is_guarded(self.settings.loop_guard, self._parameters) else None,
            )
            self._text = generation.text
            self.rollback.start_turn(turn, before)
            self._emit(ev.TurnStarted(number, text, len(prompt)))
            self.speed = generation.speed
            self._recall(turn, len(prompt), recall, is_given=reply is not None)
            logits = generation.prefill(prompt, None if reply is None else len(encoded.reply))
            if reply is None:
                outcome = generation.generate(logits, self._new_sampler())
            else:
                outcome = generation.feed_reply(reply, encoded.reply)
        except BaseException as error:
            self._undo_failed(error)
            if isinstance(error, Cancelled):
                return TurnOutcome(number, "", "cancelled", len(prompt), rolled_back=True)
            if is_out_of_memory(error):
                release_memory(self._device)
                raise TurnError(
                    f"out of memory in turn {number} ({len(prompt)} tokens); it was rolled back; try a shorter message "
                    "or a smaller --cache-size",
                    "out_of_memory",
                ) from error
            if isinstance(error, CacheFullError):  # closing a reply that ends inside a character may need more tokens
                raise TurnError(
                    f"the cache is full: the end of the reply to turn {number} does not fit, so the turn was rolled "
                    "back; use /clear to start over, or on_full = evict to drop old turns",
                    "cache_full",
                ) from error
            raise
        if outcome.rolled_back:
            self.undo()
        else:
            self.rollback.end_turn()
        return outcome

    def undo(self, number: int | None = None, *, restore_rng: bool = True) -> UndoResult:
        """Undo turn `number` and all later ones.

        Args:
            number: Turn number; None for the newest.
            restore_rng: Also restore the random generator, so that the same message gets the same reply.

        Raises:
            ConfigError: Nothing to undo, or the turn is too old.
        """
        if not self.log.turns:
            raise ConfigError("nothing to undo yet")
        turn = self.log.turns[-1 if number is None else number - 1]
        if turn.before is None:
            raise ConfigError(f"turn {turn.number} is too old to undo; only the last {REACH} turns can be undone")
        return self._undone(turn, turn.before, restore_rng=restore_rng)

    def rewind(self, number: int, marks: Mapping[int, CacheMark]) -> UndoResult:
        """Undo all turns after turn `number`, however old it is, and later changes of pins.

        Args:
            number: A turn that is not the newest.
            marks: The cache before some turns, by number: for those whose `before` was dropped.
        """
        turns = self.log.turns
        for turn in turns[max(0, number + 1 - REACH) : number + 1]:
            if turn.before is None and turn.number in marks:
                turn.before = TurnStart(marks[turn.number])
        turn = turns[number]
        before = turn.before = turn.before or TurnStart(self.full_mark(number))
        return self._undone(turn, before, pins_of_then=True)

    def full_mark(self, number: int) -> CacheMark:
        """Return the bookkeeping of a cache with all tokens up to the end of turn `number`, whatever the budget is."""
        stop = self.log.turns[number].start if number < len(self.log.turns) else len(self.log)
        held = ((0, stop),) if stop else ()
        pins = ((0, self.system_tokens),) if self.system_tokens else ()
        starts = tuple(turn.start for turn in self.log.turns[:number])
        return CacheMark(held, pins, starts, self.cache.compression_count)

    def _undone(
        self, turn: TurnRecord, before: TurnStart, *, restore_rng: bool = True, pins_of_then: bool = False
    ) -> UndoResult:
        result = self.rollback.undo(turn, pins_of_then=pins_of_then)
        if restore_rng and before.generator is not None:
            self._generator.set_state(before.generator)
        self.speed = before.speed
        for sentence in result.notices(self.cache):
            self._emit(ev.Notice(sentence))
        return result

    def record_steps(self) -> None:
        """Capture the steps for short prompts that the latest turn used, on a GPU. Slow: call it between turns."""
        record_used(self.model, self.cache)

    @property
    def recorded_step(self) -> StepReport | None:
        """The captured step that computes new tokens now, or what replaced it; None for a model without one."""
        return recorded_step(self.model)

    # --- inside a turn ----------------------------------------------------------------------------------------

    def _new_sampler(self) -> TokenSampler:
        dry = dry_penalty(self.settings, self.log, self.cache.cache_size, self.encoder.control_ids, self.tokenizer)
        return self.sampler(self.settings, self._device, self._generator, dry)

    def _recall(self, turn: TurnRecord, prompt_tokens: int, wanted: Sequence[int], *, is_given: bool) -> None:
        """Recall evicted turns for the reply, if one is generated and the turn is not a hidden one."""
        if is_given or self.is_muted or self.settings.on_full == "stop":
            self.cache.recalled = ()
            if wanted:
                self._emit(ev.Notice("No turn was recalled: with on_full = stop, nothing may be evicted.", "warning"))
            return
        for event in self.auto_recall.before_reply(turn, prompt_tokens, self.settings, wanted, self.find_evicted):
            self._emit(event)

    def _undo_failed(self, error: BaseException) -> None:
        """Undo the running turn; none of its values that are not finite stay in the cache's buffers."""
        not_finite = isinstance(error, TurnError) and error.failure == "not_finite"
        if not_finite:
            self.cache.replace_not_finite()  # before tokens may be prefilled again
        self.undo()
        if not_finite:
            self.cache.replace_not_finite()  # a restored copy may have tokens of the turn

    def _new_turn(self, text: str, reply: str | None) -> tuple[TurnRecord, EncodedTurn]:
        """Encode the next turn; return its record and its ids.

        Raises:
            TurnError: The cache is full.
        """
        latest = self.log.turns[-1] if self.log.turns else None
        number = 1 if latest is None else latest.number + 1
        if self.encoder.format.renew is not None:
            self.encoder = ChatEncoder(self.tokenizer, self.encoder.format.renew())
        encoded = self.encoder.encoded(text, latest is None, reply, "." if latest is None else latest.reply)
        prompt, at = encoded.prompt, len(self.log)
        if self.settings.on_full == "stop":
            require_room(self.cache, self.encoder, number, len(prompt) + len(encoded.reply))
        turn = TurnRecord(number, at, at + encoded.message_start, at + encoded.reply_start, text=text)
        turn.prompt_end, turn.given = at + len(prompt), reply is not None
        return turn, encoded
