"""The engine: one owner thread for model and cache, one queue of requests in, one stream of events out."""

from __future__ import annotations

import logging
import queue
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from streamchat.chat import events as ev
from streamchat.chat.assemble import Load, assemble, load_from_settings
from streamchat.config import Configuration
from streamchat.errors import ConfigError, ExitCode, StreamchatError, TurnError
from streamchat.settings import Settings
from streamchat.telemetry.memory import device_memory, free_unused, process_rss

if TYPE_CHECKING:  # torch is imported on the engine's thread only
    from streamchat.chat.conversation import Conversation, TurnOutcome

_log = logging.getLogger(__name__)

STATUS_INTERVAL_S = 0.5
IDLE_INTERVAL_S = 1.0


@dataclass
class _Turn:
    text: str
    cancel: threading.Event = field(default_factory=threading.Event)


class _Closing(Exception):
    """Loading was interrupted because the engine closes."""


class Engine:
    """Implements `ChatEngine`. All methods may be called from any thread and return at once.

    Args:
        configuration: Settings, and where they came from for messages.
        load: Gets the model; replaceable for tests.
    """

    def __init__(
        self,
        configuration: Configuration,
        load: Load = load_from_settings,
    ) -> None:
        self._configuration, self._load = configuration, load
        self._settings = configuration.settings
        self._sinks: list[Callable[[ev.Event], None]] = []
        self._requests: queue.SimpleQueue[_Turn | Callable[[], None] | None] = queue.SimpleQueue()
        self._turns: list[_Turn] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="streamchat-engine", daemon=True)
        self._conversation: Conversation | None = None
        self._device = "cpu"
        self._busy = False
        self._last_status = 0.0

    # --- requests, from any thread ----------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self._settings

    @property
    def busy(self) -> bool:
        """A turn is running or queued."""
        with self._lock:
            return bool(self._turns)

    def subscribe(self, sink: Callable[[ev.Event], None]) -> Callable[[], None]:
        """Call `sink` with every event, on the engine's thread; returns a function that ends it."""
        self._sinks.append(sink)

        def unsubscribe() -> None:
            if sink in self._sinks:
                self._sinks.remove(sink)

        return unsubscribe

    def start(self) -> None:
        """Start loading the model."""
        self._thread.start()

    def submit(self, text: str) -> None:
        """Queue a user message."""
        turn = _Turn(text)
        with self._lock:
            self._turns.append(turn)
        self._requests.put(turn)

    def stop_reply(self) -> None:
        """Stop the running turn, or take back the one that waits longest."""
        with self._lock:
            if self._turns:
                self._turns[0].cancel.set()

    def clear(self) -> None:
        """Forget the conversation."""
        self._requests.put(lambda: self._start_over(self._settings))

    def set_system_prompt(self, text: str) -> None:
        """Start over with another system prompt."""
        self._requests.put(lambda: self._start_over(replace(self._settings, system_prompt=text)))

    def set_option(self, name: str, value: Any) -> None:
        """Change a live setting from the next turn on."""
        self._requests.put(lambda: self._set_option(name, value))

    def pin(self, turn: int) -> None:
        """Keep this turn in the cache."""
        self._requests.put(lambda: self._set_pin(turn, True))

    def unpin(self, turn: int) -> None:
        """Let this turn leave again."""
        self._requests.put(lambda: self._set_pin(turn, False))

    def switch_model(self, name: str) -> None:
        """Load another model and start over with it."""
        self._requests.put(lambda: self._switch_model(name))

    def count_tokens(self, text: str) -> None:
        """Measure a text that may be sent."""
        self._requests.put(lambda: self._count(text))

    def close(self, timeout_s: float = 2.0) -> bool:
        """Stop everything; returns whether the thread ended in time."""
        self._closing.set()
        with self._lock:
            for turn in self._turns:
                turn.cancel.set()
        self._requests.put(None)
        if self._thread.ident is None:
            return True
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # --- the owner thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._prepare(self._configuration)
            self._sample_status()
            self._serve()
        except _Closing:
            pass
        except StreamchatError as error:
            self._fail(error.title, str(error), error.exit_code)
        except BaseException as error:
            text = f"unexpected {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            self._fail("The engine failed", text, ExitCode.FAILURE)
        finally:
            if self._conversation is not None:
                self._conversation.close()
            self._emit(ev.EngineClosed())

    def _fail(self, title: str, message: str, exit_code: ExitCode) -> None:
        details = traceback.format_exc()
        _log.error("%s: %s\n%s", title, message, details)
        self._emit(ev.EngineFailed(title, message, int(exit_code), details))

    def _prepare(self, configuration: Configuration) -> None:
        started = time.perf_counter()
        self._progress("Starting", 0, 0, "")
        assembled = assemble(configuration, self._load, self._emit_and_sample, self._progress)
        previous, self._conversation = self._conversation, assembled.conversation
        self._configuration, self._settings = configuration, configuration.settings
        self._device = assembled.device
        if previous is not None:
            previous.close()
            previous = None
            free_unused()
            self._emit(ev.ConversationCleared(self._settings.system_prompt, assembled.info.pinned_tokens))
        self._emit(ev.ModelReady(assembled.info, time.perf_counter() - started))
        for text in assembled.notes:
            self._emit(ev.Notice(text))

    def _progress(self, stage: str, done: int, total: int, unit: str) -> None:
        if self._closing.is_set():
            raise _Closing
        self._emit(ev.ModelLoading(stage, done, total, "bytes" if unit == "bytes" else ""))

    def _serve(self) -> None:
        while not self._closing.is_set():
            try:
                request = self._requests.get(timeout=IDLE_INTERVAL_S)
            except queue.Empty:
                self._sample_status()
                continue
            if isinstance(request, _Turn):
                self._take_turn(request)
            elif request is not None:
                request()
                self._sample_status()

    def _take_turn(self, turn: _Turn) -> None:
        conversation = self._conversation
        assert conversation is not None
        self._busy = True
        if turn.cancel.is_set():
            outcome = self._unstarted(conversation, "cancelled", "")
        else:
            try:
                outcome = conversation.run_turn(turn.text, turn.cancel.is_set)
            except TurnError as error:
                _log.warning("turn failed", exc_info=True)
                outcome = self._unstarted(conversation, "error", str(error))
            except Exception as error:
                _log.exception("turn failed")
                first = (str(error).splitlines() or [""])[0]
                outcome = self._unstarted(
                    conversation, "error", f"the turn failed and was taken back: {type(error).__name__}: {first}"
                )
        with self._lock:
            self._turns.remove(turn)
        self._busy = False
        self._sample_status()
        self._emit(
            ev.TurnFinished(
                stats=self._stats(conversation, outcome),
                finish_reason=outcome.finish_reason,
                reply=outcome.reply,
                text=turn.text,
                rolled_back=outcome.rolled_back,
                message=outcome.message,
            )
        )

    def _unstarted(self, conversation: Conversation, reason: ev.FinishReason, message: str) -> TurnOutcome:
        from streamchat.chat.conversation import TurnOutcome

        number = len(conversation.log.turns) + 1
        return TurnOutcome(number, "", reason, 0, 0, None, None, rolled_back=True, message=message)

    def _stats(self, conversation: Conversation, outcome: TurnOutcome) -> ev.TurnStats:
        state = conversation.state()
        device = device_memory(self._device)
        return ev.TurnStats(
            turn=outcome.turn,
            prompt_tokens=outcome.prompt_tokens,
            new_tokens=outcome.new_tokens,
            cache_len=state.length,
            cache_size=state.cache_size,
            compressions=state.compressions,
            tokens_evicted=state.tokens_evicted,
            ttft_s=outcome.ttft_s,
            decode_tps=outcome.decode_tps,
            kv_bytes=state.kv_bytes,
            rss_bytes=process_rss(),
            vram_bytes=device.allocated if device else None,
            finish_reason=outcome.finish_reason,
        )

    def _start_over(self, settings: Settings) -> None:
        from streamchat.chat.template import choose_format

        conversation = self._conversation
        assert conversation is not None
        try:
            chat_format = choose_format(conversation.tokenizer, settings.chat_format, settings.system_prompt)
            conversation.start_over(chat_format)
        except ConfigError as error:
            self._emit(ev.Notice(f"Nothing was changed: {error}", "error"))
            return
        self._settings = conversation.settings = settings
        self._emit(ev.ConversationCleared(settings.system_prompt, conversation.pinned_tokens))

    def _count(self, text: str) -> None:
        assert self._conversation is not None
        self._emit(ev.TextCounted(text, len(self._conversation.encoder.text(text))))

    def _set_pin(self, number: int, pinned: bool) -> None:
        assert self._conversation is not None
        try:
            tokens = self._conversation.set_pin(number, pinned)
        except ConfigError as error:
            self._emit(ev.Notice(str(error), "warning"))
            return
        self._emit(ev.TurnPinned(number, pinned, tokens, self._conversation.state()))

    def _switch_model(self, name: str) -> None:
        settings = replace(self._settings, model=name)
        origins = {**self._configuration.origins, "model": "/model"}
        try:
            self._prepare(Configuration(settings, origins, self._configuration.file))
        except StreamchatError as error:
            _log.warning("switching to %s failed", name, exc_info=True)
            self._emit(ev.Notice(f"{error}; the conversation goes on with the model it has", "error"))
        except Exception as error:
            _log.exception("switching to %s failed", name)
            first = (str(error).splitlines() or [""])[0]
            text = f"{name} could not be loaded ({type(error).__name__}: {first}); the conversation goes on"
            self._emit(ev.Notice(text, "error"))

    def _set_option(self, name: str, value: Any) -> None:
        assert self._conversation is not None
        self._settings = self._conversation.settings = replace(self._settings, **{name: value})
        if name == "seed":
            self._conversation.reseed()
        self._emit(ev.SettingChanged(name, value))

    # --- events -----------------------------------------------------------------------------------------------

    def _emit(self, event: ev.Event) -> None:
        for sink in list(self._sinks):
            try:
                sink(event)
            except Exception:
                _log.exception("a subscriber failed on %s", type(event).__name__)

    def _emit_and_sample(self, event: ev.Event) -> None:
        self._emit(event)
        if time.perf_counter() - self._last_status >= STATUS_INTERVAL_S:
            self._sample_status()

    def _sample_status(self) -> None:
        conversation = self._conversation
        if conversation is None:
            return
        self._last_status = time.perf_counter()
        device = device_memory(self._device)
        memory = ev.MemoryState(
            rss_bytes=process_rss(),
            device=self._device,
            allocated_bytes=device.allocated if device else None,
            reserved_bytes=device.reserved if device else None,
            total_bytes=device.total if device else None,
        )
        self._emit(
            ev.StatusSampled(
                cache=conversation.state(),
                memory=memory,
                ttft_s=conversation.ttft_s,
                decode_tps=conversation.decode_tps,
                busy=self._busy,
            )
        )
