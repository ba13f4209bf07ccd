"""Runs, replaces, undoes, pins and summarizes turns. Runs on the engine's thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError, StreamchatError, TurnError, TurnFailure, describe_unexpected
from streamchat.engine.hosting import ConversationHost
from streamchat.engine.jobs import Job, JobQueue
from streamchat.engine.status_sampler import StatusSampler
from streamchat.sessions.archive import Archive
from streamchat.telemetry.memory import FreedMemory, memory_state

if TYPE_CHECKING:  # torch is imported on the engine's thread only
    from streamchat.conversation.generation import TurnOutcome

_log = logging.getLogger(__name__)


class TurnRunner:
    """Works on the turns of the active conversation.

    Args:
        host: Has the active conversation.
        jobs: The queue that the jobs come from.
        archive: Saves the turns.
        status: Samples the figures of a turn.
        emit: Records and publishes an event.
        pause: Called before each forward pass; a server lets other conversations take their turn there.
    """

    def __init__(
        self,
        host: ConversationHost,
        jobs: JobQueue,
        archive: Archive,
        status: StatusSampler,
        emit: Callable[[ev.Event], None],
        pause: Callable[[], None] = lambda: None,
    ) -> None:
        self._host, self._jobs, self._archive, self._status, self._emit = host, jobs, archive, status, emit
        self._pause, self._freed = pause, FreedMemory()

    def run(
        self, job: Job, text: str, *, reply: str | None = None, pin: bool = False, recall: Sequence[int] = ()
    ) -> None:
        """Run a turn, emit its events up to `TurnFinished`, and pin it if requested.

        The job is finished before `TurnFinished` is emitted: front ends may send the next request then.

        Args:
            job: The request; its `cancelled` is checked before each forward.
            text: The user's message.
            reply: A given reply; None to generate one.
            pin: Pin the turn unless it is rolled back. A turn that replaces a pinned one is always pinned.
            recall: Numbers of evicted turns to recall; empty to follow the setting `auto_recall`.
        """
        host = self._host
        job.running = True
        outcome = self._outcome(job, text, reply, recall)
        self._archive.changed |= not outcome.rolled_back
        self._jobs.finish(job)
        self._finish(text, outcome)
        host.active.conversation.record_steps()
        host.active.conversation.auto_recall.prepare(host.settings)
        if not outcome.rolled_back:
            self._keep(outcome.turn, pin or host.pin_next)
        self._freed.return_if_grown()

    def _keep(self, turn: int, pin: bool) -> None:
        """Pin a finished turn if requested, and take a snapshot if one is due."""
        host = self._host
        if pin:
            host.pin_next = False
            self.set_pin(turn, True)
        every = host.settings.snapshot_turns
        if every and turn % every == 0:
            self._archive.snapshot(host.active)

    def _outcome(self, job: Job, text: str, reply: str | None, recall: Sequence[int]) -> TurnOutcome:
        if job.cancelled.is_set():
            return self._failed_outcome("cancelled")
        try:
            return self._host.active.conversation.run_turn(text, lambda: self._is_cancelled(job), reply, recall)
        except TurnError as error:
            _log.warning("turn failed", exc_info=True)
            return self._failed_outcome("error", str(error), error.failure)
        except Exception as error:
            _log.exception("turn failed")
            why = f"the turn failed and was rolled back: {describe_unexpected(error)}"
            return self._failed_outcome("error", why, "other")

    def _is_cancelled(self, job: Job) -> bool:
        """Return whether the job was stopped; called before each forward pass."""
        self._pause()
        return job.cancelled.is_set()

    def replace(self, job: Job, text: str | None = None, recall: Sequence[int] = ()) -> None:
        """Undo the newest turn and reply to `text` instead; None replies to its own message again.

        Args:
            job: The request.
            text: The message.
            recall: See `run`.
        """
        recall = tuple(dict.fromkeys(recall))
        if not job.cancelled.is_set():
            try:
                self._host.active.conversation.auto_recall.require_evicted(recall)
                before = self.undo(replaced=True)
            except ConfigError as error:
                self._jobs.finish(job)
                self._finish(text or "", self._failed_outcome("error", str(error), "other"))
                return
            text = before if text is None else text
        self.run(job, text or "", recall=recall)

    def _failed_outcome(self, reason: ev.FinishReason, message: str = "", failure: TurnFailure = "") -> TurnOutcome:
        from streamchat.conversation.generation import TurnOutcome

        number = len(self._host.active.conversation.log.turns) + 1
        return TurnOutcome(number, "", reason, rolled_back=True, message=message, failure=failure)

    def _finish(self, text: str, outcome: TurnOutcome) -> None:
        self._status.sample()
        self._emit(
            ev.TurnFinished(
                stats=self._stats(outcome),
                finish_reason=outcome.finish_reason,
                reply=outcome.reply,
                text=text,
                rolled_back=outcome.rolled_back,
                message=outcome.message,
                failure=outcome.failure,
            )
        )

    def _stats(self, outcome: TurnOutcome) -> ev.TurnStats:
        active = self._host.active
        state, memory = active.conversation.state(), memory_state(active.info.device)
        turns = active.conversation.log.turns
        return ev.TurnStats(
            turn=outcome.turn,
            prompt_tokens=outcome.prompt_tokens,
            new_tokens=outcome.new_tokens,
            cache_len=state.length,
            cache_size=state.cache_size,
            compressions=state.compressions,
            tokens_evicted=state.tokens_evicted,
            ttft_s=outcome.speed.ttft_s,
            decode_tps=outcome.speed.decode_tps,
            kv_bytes=state.kv_bytes,
            rss_bytes=memory.rss_bytes,
            vram_bytes=memory.allocated_bytes,
            finish_reason=outcome.finish_reason,
            recalled=() if outcome.rolled_back else turns[outcome.turn - 1].recalled,
        )

    def undo(self, *, replaced: bool = False, to_edit: bool = False) -> str:
        """Undo the newest turn; return its message.

        A turn that replaces a pinned one (`replaced`, `to_edit`) will also be pinned.

        Args:
            replaced: Whether another turn replaces it.
            to_edit: Whether the user wants to edit the message.

        Raises:
            ConfigError: Nothing to undo, or the turn is too old.
        """
        from streamchat.conversation.pins import is_pinned

        conversation = self._host.active.conversation
        started = time.perf_counter()
        turn = conversation.log.turns[-1] if conversation.log.turns else None
        was_pinned = turn is not None and is_pinned(turn, conversation.cache.pins, conversation.cache.num_sink_tokens)
        result = conversation.undo(restore_rng=not replaced)
        assert turn is not None
        self._host.pin_next = was_pinned and (replaced or to_edit)
        self._archive.record_undo(turn.number)
        self._emit(
            ev.TurnUndone(
                turn.number,
                turn.text,
                turn.reply,
                conversation.state(),
                result.restored,
                result.read_again,
                time.perf_counter() - started,
                replaced,
                to_edit,
            )
        )
        return turn.text

    def compact(self, job: Job) -> None:
        """Summarize the turns to be evicted next; the conversation does not change."""
        from streamchat.conversation.summarize import summarize

        job.running = True
        summary = ev.SummaryReady("", (0, 0))
        try:
            summary = summarize(self._host.active.conversation, lambda: self._is_cancelled(job), self._emit)
        except StreamchatError as error:
            self._emit(ev.Notice(str(error), "warning"))
        except Exception as error:
            _log.exception("summarizing failed")
            self._emit(ev.Notice(f"summarizing failed: {describe_unexpected(error)}", "error"))
        finally:
            self._jobs.finish(job)
        self._emit(summary)

    def page_in(self, job: Job, number: int) -> bool:
        """Page turn `number` in instead of quoting it; return whether that finished the job. A notice says why not."""
        conversation = self._host.active.conversation
        try:
            paged = conversation.page_in(number)
        except ConfigError as error:
            self._emit(ev.Notice(f"{error}; the message is quoted instead"))
            return False
        self._archive.changed = True
        self._jobs.finish(job)
        self._emit(ev.TurnPagedIn(number, paged.tokens, paged.seconds, conversation.state()))
        return True

    def set_pin(self, number: int, pinned: bool) -> None:
        """Pin or unpin a turn."""
        conversation = self._host.active.conversation
        try:
            tokens = conversation.set_pin(number, pinned)
        except ConfigError as error:
            self._emit(ev.Notice(str(error), "warning"))
            return
        self._archive.changed = True
        self._emit(ev.TurnPinned(number, pinned, tokens, conversation.state()))
