"""Runs a turn on the model: prefills its prompt, samples and shows its reply, token by token, and closes it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from streamchat.base import events as ev
from streamchat.base.errors import TurnError, TurnFailure
from streamchat.cache.room import quarter_of_room
from streamchat.cache.streaming import StreamingCache
from streamchat.config.settings import Settings
from streamchat.conversation.encoding import ChatEncoder
from streamchat.conversation.feeder import Feeder
from streamchat.conversation.log import Speed, TurnRecord
from streamchat.conversation.loops import LoopWatch
from streamchat.conversation.reply import ReplyText
from streamchat.conversation.sampling import REPETITION_WINDOW, TokenSampler
from streamchat.conversation.speculation.speculator import Speculator
from streamchat.decode import one_thread


class Cancelled(Exception):
    """The user stopped the turn during prefill."""


@dataclass
class TurnOutcome:
    """How a turn ended."""

    turn: int
    reply: str
    finish_reason: ev.FinishReason
    prompt_tokens: int = 0
    new_tokens: int = 0
    speed: Speed = field(default_factory=Speed)
    rolled_back: bool = False
    message: str = ""
    failure: TurnFailure = ""


class Generation:
    """Prefill and reply of one turn.

    Args:
        feeder: Runs the forwards.
        encoder: Encodes the end of the reply.
        turn: The turn, the newest of the log; its end and reply are set here.
        text: Receives the reply.
        settings: The current settings.
        emit: Receives progress and text.
        cancelled: Called before each forward; returns whether to stop.
        started: `time.perf_counter()` when the turn started.
        speculator: Proposes tokens; None to decode one token per forward.
        loops: Sees the reply repeat itself; None to let it.
    """

    def __init__(
        self,
        feeder: Feeder,
        encoder: ChatEncoder,
        turn: TurnRecord,
        text: ReplyText,
        settings: Settings,
        emit: Callable[[ev.Event], None],
        cancelled: Callable[[], bool],
        started: float,
        speculator: Speculator | None = None,
        loops: LoopWatch | None = None,
    ) -> None:
        self._feeder, self._encoder, self._turn, self.text = feeder, encoder, turn, text
        self._speculator, self._loops = speculator, loops
        self._settings, self._emit, self._cancelled = settings, emit, cancelled
        self._started, self._first_at = started, started
        self.speed = Speed()
        """Updated with every token."""

    def prefill(self, prompt: Sequence[int], reply_tokens: int | None = None) -> Tensor:
        """Make room for the turn and feed the prompt in chunks; return the logits (vocab_size,) after it.

        Args:
            prompt: Ids of the turn up to the reply.
            reply_tokens: Length of a given reply; None if one will be generated.

        Raises:
            Cancelled: The user stopped the turn before the last chunk.
        """

        cache = self._feeder.cache
        if reply_tokens is None:
            reply_tokens = quarter_of_room(cache.cache_size, cache.num_retained, self._settings.max_new_tokens)
        cache.begin_turn(len(prompt), reply_tokens)

        def after_chunk(done: int) -> None:
            if done:
                self._emit(ev.PrefillProgress(self._turn.number, done, len(prompt)))
            if done < len(prompt) and self._cancelled():
                raise Cancelled

        return self._feeder.feed(prompt, after_chunk)

    def generate(self, logits: Tensor, sampler: TokenSampler) -> TurnOutcome:
        """Sample a reply and close it. A reply that was stopped before it showed text is not closed.

        Args:
            logits: Those after the prompt, (vocab_size,).
            sampler: Samples the tokens.

        Raises:
            TurnError: The logits are not finite.
        """
        turn, text, reply_start = self._turn, self.text, len(self._feeder.log)
        ids, reason = self._sample(logits, sampler)
        self._show(text.finish())
        rolled_back = reason == "cancelled" and not text.shown
        if not rolled_back:
            close_reply(self._feeder, self._encoder, turn, text, ids, reply_start)
        prompt_tokens = reply_start - turn.start
        return TurnOutcome(turn.number, text.shown, reason, prompt_tokens, len(ids), self.speed, rolled_back)

    def feed_reply(self, reply: str, ids: Sequence[int]) -> TurnOutcome:
        """Show and feed a given reply.

        Raises:
            TurnError: The logits are not finite.
        """
        turn, prompt_tokens = self._turn, len(self._feeder.log) - self._turn.start
        self._show(reply)
        if ids:
            _require_finite(self._feeder.feed(ids))
        turn.end, turn.reply = len(self._feeder.log), reply
        return TurnOutcome(turn.number, reply, "stop", prompt_tokens)

    def _sample(self, logits: Tensor, sampler: TokenSampler) -> tuple[list[int], ev.FinishReason]:
        """Return the ids of a reply, of which the newest may not be fed yet, and why it ended."""
        ids: list[int] = []
        limit = self._limit()
        rows, proposals = logits[None], list[int]()
        if self._speculator is not None:
            self._speculator.begin_reply()
        while len(ids) < limit:
            if self._cancelled():
                return ids, "cancelled"
            if ids:
                rows, proposals = self._forward(ids[-1], limit - len(ids))
            if reason := self._accept(rows, proposals, ids, sampler):
                return ids, reason
        return ids, "length"

    def _forward(self, token: int, left: int) -> tuple[Tensor, list[int]]:
        """Feed `token` and fewer than `left` proposals; return the logits (n, vocabulary) after each, and these."""
        if self._speculator is None:
            return self._feeder.forward([token])[None], []
        return self._speculator.forward(token, left - 1, self._encoder.control_ids)

    def _accept(
        self, rows: Tensor, proposals: Sequence[int], ids: list[int], sampler: TokenSampler
    ) -> ev.FinishReason | None:
        """Sample and show tokens, up to the first that was not proposed; return why the reply ended, if it did.

        Nothing is emitted before the cache is rid of rejected proposals.

        Args:
            rows: (n, vocabulary) logits after the newest token and after each proposal.
            proposals: The n - 1 proposals.
            ids: The reply; sampled tokens are appended.
            sampler: Samples the tokens.
        """
        sampled, shown = list[int](), ""
        reason: ev.FinishReason | None = None
        for row, proposal in zip(rows, [*proposals, None], strict=True):
            token = sampler(_require_finite(row), self._recent())
            self._measure(len(ids))
            sampled.append(token)
            if self.text.ended_by(token):
                reason = "stop"
                break
            ids.append(token)
            shown += self.text.push(token)
            reason = self._end_with(token)
            if reason or token != proposal:
                break
            self._feeder.accept(token)
        if proposals:
            self._feeder.drop_rejected()
        if self._speculator is not None:
            self._speculator.learn(sampled)
        self._show(shown)
        return reason

    def _end_with(self, token: int) -> ev.FinishReason | None:
        """Return why the reply ends with `token`, its newest one; None if it does not."""
        is_loop = self._loops is not None and self._loops.is_loop_with(token)
        if self.text.stopped:
            return "stop"
        return "loop" if is_loop else None

    def _limit(self) -> int:
        """Return the maximum number of tokens of the reply."""
        limit, cache = self._settings.max_new_tokens, self._feeder.cache
        if self._settings.on_full == "stop":
            limit = min(limit, cache.cache_size - cache.length - len(self._encoder.close()))
        return limit

    def _show(self, text: str) -> None:
        """Emit more text of the reply, if there is any."""
        if text:
            self._emit(ev.TextDelta(self._turn.number, text))

    def _measure(self, before: int) -> None:
        """Update the speed after a token was sampled; `before` is the number of tokens before it."""
        now = time.perf_counter()
        if before:
            self.speed.decode_tps = before / (now - self._first_at)
        else:
            self._first_at, self.speed.ttft_s = now, now - self._started

    def _recent(self) -> list[int]:
        """Return the newest ids of the conversation, without control tokens."""
        control = self._encoder.control_ids
        return [token for token in self._feeder.log.ids[-REPETITION_WINDOW:] if token not in control]


def close_reply(
    feeder: Feeder, encoder: ChatEncoder, turn: TurnRecord, text: ReplyText, ids: list[int], reply_start: int
) -> None:
    """Cut log and cache to exactly what the reply has shown, and close its message and the turn.

    Args:
        feeder: Has the log and the cache.
        encoder: Encodes the end of the message.
        turn: The newest turn.
        text: The finished reply.
        ids: Ids of the reply, from its start in the log on; the newest may not be fed yet.
        reply_start: Log index of the first of them.
    """
    kept = text.kept()
    fed = len(feeder.log) - reply_start
    if kept.tokens < fed:
        feeder.cut(reply_start + kept.tokens)
    before = text.written.removesuffix(kept.rest)
    feeder.feed(ids[fed : kept.tokens] + encoder.close(before, kept.rest))
    turn.end, turn.reply = len(feeder.log), text.shown


def require_room(cache: StreamingCache, encoder: ChatEncoder, number: int, prompt_tokens: int) -> None:
    """Require free room for the prompt of turn `number`, one reply token and the close.

    Raises:
        TurnError: The cache is too full.
    """
    size = cache.cache_size
    needed, free = prompt_tokens + 1 + len(encoder.close()), size - cache.length
    if needed > free:
        raise TurnError(
            f"the cache is full: turn {number} needs at least {needed} tokens, and {free} of {size} are free; "
            "use /clear to start over, or on_full = evict to drop old turns",
            "cache_full",
        )


def _require_finite(logits: Tensor) -> Tensor:
    """Return `logits`.

    Raises:
        TurnError: They contain NaN or +inf.
    """
    # the maximum is NaN if any logit is NaN, and infinite if one is +inf
    if not math.isfinite(one_thread.maximum(logits)):
        raise TurnError(
            "the model produced NaN/inf logits; the turn was rolled back, and --dtype float32 usually helps",
            "not_finite",
        )
    return logits
