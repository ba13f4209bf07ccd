"""What must hold at every turn of a run. Each has a name, and says with values where it does not hold.

Checks by the engine's thread, between turns, read the layers themselves. The account of what was evicted is kept here
from the events alone, independently of the cache's own ledger.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streamchat.base import events as ev
from streamchat.base.formatting import human_bytes
from streamchat.cache.eviction.policy import merged_runs
from streamchat.conversation.template.reference import Reference
from streamchat.conversation.template.rendering import UnusableTemplateError
from streamchat.conversation.template.turn_check import FedTurn, turn_difference
from streamchat.replay.trend import Trend, trend

if TYPE_CHECKING:
    from streamchat.conversation.conversation import Conversation

WINDOW = 400
"""Turns over which times are watched."""
MEMORY_WINDOW = 200
"""Turns over which memory is watched."""
MEMORY_WARM_UP = 100
"""First turns whose memory is not looked at: libraries keep what they compile for each length of a prompt."""
TREND_EVERY = 25
MEMORY_GROWTH = 0.05
"""Process or device memory may grow by this share over the window, ..."""
MEMORY_LEAST = 32_000_000
"""... or by so many bytes, if that is more."""
OVERHEAD_TOKENS = 16
"""What a forward costs by itself, in tokens of prefill, roughly."""
STALL_TIMES, STALL_S = 10, 2.0
"""A turn is slow that took so many times what is usual, and so many seconds more."""
WARM_UP = 10
"""First turns of a run whose times are not looked at."""


@dataclass(frozen=True)
class Violation:
    """Something that does not hold."""

    name: str
    turn: int
    """Of the run, counted from 1."""
    detail: str


@dataclass
class Invariant:
    """One of them, over a run."""

    name: str
    what: str
    """A sentence for the report."""
    checked: int = 0
    violations: int = 0
    first: str = ""
    """Detail of the first violation."""
    last: str = ""
    """The latest figure, for those that have one."""

    @property
    def holds(self) -> bool:
        """So far."""
        return self.violations == 0


def all_invariants(drift: float) -> dict[str, Invariant]:
    """By name, in the order of the report."""
    share = f"{100 * drift:.0f} %"
    memory = f"{100 * MEMORY_GROWTH:.0f} % or {human_bytes(MEMORY_LEAST)}, the larger, after {MEMORY_WARM_UP} turns"
    every = (
        ("layer-lengths", "Every layer holds exactly what the ledger says, and never more than the budget."),
        ("storage", "The bytes of the cache's buffers do not change once they are allocated."),
        (
            "cached-ids",
            "The cache holds the ids that the chat template renders for the conversation, minus the ranges that were "
            "told evicted.",
        ),
        ("turns", "Every turn came to its end."),
        ("logits-finite", "No logit was NaN or infinite where a token was drawn or a reply was fed."),
        ("process-memory", f"Process memory does not grow over {MEMORY_WINDOW} turns by more than {memory}."),
        ("device-memory", f"Device memory does not grow over {MEMORY_WINDOW} turns by more than {memory}."),
        ("turn-time", f"No turn took {STALL_TIMES} times what its tokens usually take, and {STALL_S:g} s more."),
        ("first-token-time", f"Time to first token, prompt length allowed for, does not grow by more than {share}."),
        ("decode-time", f"Time of a token with a full cache does not grow by more than {share}."),
    )
    return {name: Invariant(name, what) for name, what in every}


@dataclass
class Inspector:
    """Checks a run. `see` every event and `turn_over` after each turn, on the engine's thread.

    Args:
        drift: Share by which times may drift over the window.
        report: Called at once with each violation.
    """

    drift: float
    report: Callable[[Violation], None]
    invariants: dict[str, Invariant] = field(default_factory=dict)
    _turn: int = 0
    """Of the run, counted from 1."""
    _here: int = 0
    """Of this process."""
    _evicted: list[tuple[int, int]] = field(default_factory=list)
    _storage: tuple[int, int] | None = None
    """Id of the cache, and the bytes of its buffers."""
    _rss: deque[float] = field(default_factory=lambda: deque(maxlen=MEMORY_WINDOW))
    _vram: deque[float] = field(default_factory=lambda: deque(maxlen=MEMORY_WINDOW))
    _first: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _decode: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    """Seconds a token, with a cache that has evicted."""
    _every_decode: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _drifting: set[str] = field(default_factory=set)
    _reference: Reference | None = None

    def __post_init__(self) -> None:
        self.invariants = all_invariants(self.drift)

    @property
    def holds(self) -> bool:
        """All of them, so far."""
        return all(invariant.holds for invariant in self.invariants.values())

    def account(self) -> dict[str, dict[str, Any]]:
        """What was found so far, for `go_on`."""
        kept = ("checked", "violations", "first", "last")
        return {name: {key: getattr(each, key) for key in kept} for name, each in self.invariants.items()}

    def go_on(self, account: dict[str, dict[str, Any]], turns: int) -> None:
        """Add to what an earlier process found in so many turns."""
        self._turn = turns
        for name, found in account.items():
            if name in self.invariants:
                for key, value in found.items():
                    setattr(self.invariants[name], key, value)

    def see(self, event: ev.Event, conversation: Conversation | None) -> None:
        """Keep account, and look at the layers where the cache has just changed."""
        match event:
            case ev.ConversationCleared():
                self._evicted = []
            case ev.ConversationResumed() | ev.TurnUndone():
                # what was evicted before is known from the cache alone
                self._evicted = []
                if conversation is not None:
                    self._evicted = _gaps(conversation.cache.ledger.runs, len(conversation.log))
            case ev.TokensEvicted(runs=runs):
                self._evicted = merged_runs([*self._evicted, *runs])
                if conversation is not None:
                    self._lengths(conversation)
            case _:
                pass

    def turn_over(self, event: ev.TurnFinished, conversation: Conversation) -> None:
        """All checks that a finished turn allows."""
        self._turn += 1
        self._here += 1
        stats = event.stats
        if event.finish_reason == "error":
            finite = "NaN/inf logits" not in event.message
            self._check("turns", False, event.message)
            self._check("logits-finite", finite, event.message)
        else:
            self._check("turns", True)
            self._check("logits-finite", True)
        self._lengths(conversation, stats.cache_len)
        self._bytes(conversation)
        if not event.rolled_back:
            self._ids(conversation)
        if self._here > MEMORY_WARM_UP:
            self._rss.append(stats.rss_bytes)
            if stats.vram_bytes is not None:
                self._vram.append(stats.vram_bytes)
        if self._here > WARM_UP and not event.rolled_back:
            self._time(stats)
            if stats.ttft_s is not None:
                self._first.append((stats.prompt_tokens, stats.ttft_s))
            if stats.decode_tps and stats.new_tokens >= 4 and stats.compressions:
                self._decode.append(1 / stats.decode_tps)
        if self._turn % TREND_EVERY == 0:
            self.check_trends()

    def check_trends(self) -> None:
        """Memory and times over the window."""
        for name, values in (("process-memory", self._rss), ("device-memory", self._vram)):
            found = trend(list(values)) if len(values) == MEMORY_WINDOW else None
            if found is not None:
                bound = max(MEMORY_LEAST, MEMORY_GROWTH * found.median)
                self._trend(name, found, bound, human_bytes)
        first = trend(_without_length(list(self._first)))
        if first is not None:
            self._trend("first-token-time", first, self.drift, _percent)
        decode = trend(list(self._decode))
        if decode is not None:
            usual = decode.median
            scaled = Trend(decode.change / usual, decode.low / usual, decode.high / usual, 1.0, decode.count)
            self._trend("decode-time", scaled, self.drift, _percent)

    # --- each by itself -------------------------------------------------------------------------------------------

    def _check(self, name: str, holds: bool, detail: str = "") -> None:
        invariant = self.invariants[name]
        invariant.checked += 1
        if not holds:
            invariant.violations += 1
            invariant.first = invariant.first or f"turn {self._turn}: {detail}"
            if invariant.violations <= 3:
                self.report(Violation(name, self._turn, detail))

    def _trend(self, name: str, found: Trend, bound: float, words: Callable[[float], str]) -> None:
        text = (
            f"{words(found.change)} over {found.count} turns (99 % interval {words(found.low)} to {words(found.high)}; "
            f"bound {words(bound)})"
        )
        self.invariants[name].last = text
        grows = found.grows(bound)
        if not grows:
            self._drifting.discard(name)
            self._check(name, True)
        elif name not in self._drifting:  # told once, and again only after it was well in between
            self._drifting.add(name)
            self._check(name, False, text)

    def _lengths(self, conversation: Conversation, told: int | None = None) -> None:
        cache = conversation.cache
        lengths = cache.lengths
        right = set(lengths) == {cache.length} and cache.length <= cache.cache_size and told in (None, cache.length)
        self._check(
            "layer-lengths",
            right,
            f"layers hold {_short(lengths)}, the ledger says {cache.length}, the budget is {cache.cache_size}"
            + ("" if told is None else f", and {told} was told"),
        )

    def _time(self, stats: ev.TurnStats) -> None:
        """Against the median of the turns before: of prefill a token, and of decoding a token."""
        took = usual = 0.0
        if stats.ttft_s is not None and len(self._first) >= WARM_UP:
            tokens = stats.prompt_tokens + OVERHEAD_TOKENS
            took += stats.ttft_s
            usual += tokens * statistics.median(s / (t + OVERHEAD_TOKENS) for t, s in self._first)
        if stats.decode_tps and len(self._every_decode) >= WARM_UP:
            took += stats.new_tokens / stats.decode_tps
            usual += stats.new_tokens * statistics.median(self._every_decode)
        if stats.decode_tps:
            self._every_decode.append(1 / stats.decode_tps)
        if usual:
            slow = took > STALL_TIMES * usual and took > usual + STALL_S
            self._check("turn-time", not slow, f"it took {took:.1f} s, and {usual:.2f} s are usual for its tokens")

    def _bytes(self, conversation: Conversation) -> None:
        now = (id(conversation.cache), conversation.cache.kv_bytes)
        if self._storage is None or self._storage[0] != now[0]:
            self._storage = now
        self._check(
            "storage",
            self._storage == now,
            f"the buffers take {human_bytes(now[1])} and took {human_bytes(self._storage[1])}",
        )

    def _ids(self, conversation: Conversation) -> None:
        log, cache = conversation.log, conversation.cache
        held = _gaps(self._evicted, len(log))
        if list(cache.ledger.runs) != held:
            self._check(
                "cached-ids", False, f"runs {_short(cache.ledger.runs)} are held, and by the events {_short(held)}"
            )
            return
        detail = self._difference(conversation)
        self._check("cached-ids", not detail, f"turn {log.turns[-1].number}: {detail}")

    def _difference(self, conversation: Conversation) -> str:
        """How the newest turn in the token log differs from what the chat template renders for it; '' if not at all."""
        log, encoder, tokenizer = conversation.log, conversation.encoder, conversation.tokenizer
        turn = log.turns[-1]
        if turn.prompt_end is None:
            return ""
        prompt = conversation.settings.system_prompt
        if self._reference is None or self._reference.format != encoder.format:
            self._reference = Reference(tokenizer, encoder.format, prompt)
        # A long conversation is not looked at as a whole: the first turn and the one before the newest are enough.
        earlier = log.turns[:-1] if len(log.turns) <= 3 else [log.turns[0], log.turns[-2]]
        history = [(before.text, before.reply) for before in earlier]
        start = earlier[-1].start if earlier else 0
        ids = log.ids[start : turn.end].tolist()
        fed = FedTurn(history, turn.text, turn.reply, ids, turn.prompt_end - start, turn.given)
        try:
            detail = turn_difference(self._reference, tokenizer, encoder.control_ids, fed)
        except UnusableTemplateError:  # the texts of this turn make it raise
            return ""
        if detail or (turn.given and "newest-turn" not in encoder.format.fallbacks):
            return detail
        reply = log.ids[turn.prompt_end : turn.end].tolist()
        close = encoder.close(turn.reply)  # in some templates a text, which decoding shows
        if close and reply[-len(close) :] == close:
            del reply[-len(close) :]
        said = tokenizer.decode(reply, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        is_said = _same_text(said, turn.reply) or _same_text(conversation.text_of(reply), turn.reply)
        return "" if is_said else f"the reply {turn.reply[-200:]!r} is fed as {said[-200:]!r}"


def _same_text(said: str, shown: str) -> bool:
    """White space at the start is not shown, and a character that was cut off is neither."""
    said, shown = said.strip().rstrip("\N{REPLACEMENT CHARACTER}"), shown.strip().rstrip("\N{REPLACEMENT CHARACTER}")
    return said == shown


def _gaps(runs: list[tuple[int, int]], stop: int) -> list[tuple[int, int]]:
    """What of `[0, stop)` is in none of the ascending runs."""
    out, at = [], 0
    for first, end in runs:
        if first > at:
            out.append((at, first))
        at = max(at, end)
    if at < stop:
        out.append((at, stop))
    return out


def _without_length(figures: list[tuple[int, float]]) -> list[float]:
    """Times over what a straight line in prompt tokens would give: 1.0 is usual."""
    import numpy as np

    if len(figures) < 2:
        return []
    tokens, seconds = np.array([f[0] for f in figures], float), np.array([f[1] for f in figures], float)
    if np.ptp(tokens) == 0:
        expected = np.full(len(seconds), float(np.median(seconds)))
    else:
        line = np.polyfit(tokens, seconds, 1)
        # a line may cross zero where most prompts are short
        expected = np.maximum(np.polyval(line, tokens), 0.25 * float(np.median(seconds)))
    return [float(x) for x in seconds / expected]


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %"


def _short(values: Any) -> str:
    text = str(list(values))
    return text if len(text) <= 200 else text[:120] + " ... " + text[-60:]
