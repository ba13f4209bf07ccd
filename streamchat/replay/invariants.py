"""Invariants of a run, checked at every turn. A violation is reported with its values.

The checks judge from events alone, so that a recorded run can be judged again. What the layers contain comes from
`CacheAudited`; the evicted ranges come from `TokensEvicted`, independently of the cache's ledger.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from streamchat.base import events as ev
from streamchat.base.formatting import human_bytes, plural
from streamchat.cache.eviction.policy import merged_runs, runs_without
from streamchat.config.settings import LoopGuard
from streamchat.conversation.loops import is_guarded
from streamchat.replay.repetition import is_endless, repeated_end
from streamchat.replay.trend import Trend, trend

WINDOW = 400
"""Turns over which times are checked."""
MEMORY_WINDOW = 200
"""Turns over which memory is checked, at most."""
MEMORY_LEAST = 50
"""Turns over which memory is checked, at least: a run of 160 turns must show a growth of a few MB per turn."""
MEMORY_WARM_UP = 100
"""First turns whose memory is not checked, because libraries cache what they compile for each prompt length."""
TREND_EVERY = 25
MEMORY_GROWTH = 0.05
"""Allowed growth of process or device memory over the window, as a share, ..."""
MEMORY_GROWTH_BYTES = 32_000_000
"""... or in bytes, whichever is larger."""
OVERHEAD_TOKENS = 16
"""Approximate fixed cost of a forward, in tokens of prefill."""
STALL_TIMES, STALL_S = 10, 2.0
"""A turn is slow if it takes more than `STALL_TIMES` times the usual time, and `STALL_S` more seconds."""
LOOP_CYCLE, LOOP_TIMES, LOOP_WORDS = 48, 10, 160
"""A reply is an endless repetition if at most `LOOP_CYCLE` words occur `LOOP_TIMES` times at its end and fill
`LOOP_WORDS` words: more than the guard needs, which counts tokens."""
WARM_UP = 10
"""First turns of a process whose times are not checked."""


@dataclass(frozen=True)
class Violation:
    """An invariant that does not hold at one turn."""

    name: str
    turn: int
    """Turn of the run, counted from 1."""
    detail: str


@dataclass
class Invariant:
    """One invariant and its verdict over a run."""

    name: str
    what: str
    """Description for the report."""
    checked: int = 0
    violations: int = 0
    first: str = ""
    """Detail of the first violation."""
    last: str = ""
    """Latest figure, for trends and counts."""
    counted: int = 0
    """Turns that it counts without judging them."""

    @property
    def holds(self) -> bool:
        """Whether there were no violations so far."""
        return self.violations == 0


def all_invariants(drift: float) -> dict[str, Invariant]:
    """Return the invariants by name, in the order of the report."""
    share = f"{100 * drift:.0f} %"
    bound = f"{100 * MEMORY_GROWTH:.0f} % or {human_bytes(MEMORY_GROWTH_BYTES)}, whichever is larger"
    memory = f"{bound}, after {MEMORY_WARM_UP} turns"
    every = (
        ("layer-lengths", "Every layer caches exactly the tokens in the ledger, and never more than the budget."),
        ("storage", "The size of the cache's buffers does not change once they are allocated."),
        (
            "cached-ids",
            "The cached ids are those that the chat template renders for the conversation, minus the ranges that were "
            "reported as evicted.",
        ),
        ("turns", "Every turn finished."),
        ("logits-finite", "No logit was NaN or infinite when a token was sampled or a reply was fed."),
        ("process-memory", f"Process memory does not grow over up to {MEMORY_WINDOW} turns by more than {memory}."),
        ("device-memory", f"Device memory does not grow over up to {MEMORY_WINDOW} turns by more than {memory}."),
        ("turn-time", f"No turn took {STALL_TIMES} times the usual time for its tokens, and {STALL_S:g} s more."),
        ("first-token-time", f"Time to first token, adjusted for prompt length, does not grow by more than {share}."),
        ("decode-time", f"Time per token with a full cache does not grow by more than {share}."),
        ("loops", "The loop guard, if it is on, stops every reply that repeats the same words without end."),
    )
    return {name: Invariant(name, what) for name, what in every}


@dataclass
class Inspector:
    """Checks a run of an engine that audits. Call `observe` for every event, in order.

    Args:
        drift: Allowed growth of times over the window, as a share.
        report: Called with each violation when it is found.
        loop_guard: The setting.
    """

    drift: float
    report: Callable[[Violation], None]
    loop_guard: LoopGuard = "off"
    is_disturbed: Callable[[], bool] = lambda: False
    """Whether something from outside may have slowed down the current turn, so that its times are not checked."""
    invariants: dict[str, Invariant] = field(default_factory=dict)
    audit: ev.CacheAudited | None = None
    """The latest audit."""
    evicted: list[tuple[int, int]] = field(default_factory=list)
    """Runs of log indices that events reported as evicted."""
    _turn: int = 0
    """Current turn of the run, counted from 1."""
    _process_turns: int = 0
    """Turns in this process."""
    _storage: tuple[int, int] | None = None
    """Id of the cache object, and bytes of its buffers."""
    _rss: deque[float] = field(default_factory=lambda: deque(maxlen=MEMORY_WINDOW))
    _vram: deque[float] = field(default_factory=lambda: deque(maxlen=MEMORY_WINDOW))
    _first_token: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _decode: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    """Seconds per token, with a cache that has evicted."""
    _all_decode: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _drifting: set[str] = field(default_factory=set)
    _is_guarded: bool = False
    """Whether replies of the loaded model are stopped when they loop."""

    def __post_init__(self) -> None:
        self.invariants = all_invariants(self.drift)

    @property
    def holds(self) -> bool:
        """Whether all invariants hold so far."""
        return all(invariant.holds for invariant in self.invariants.values())

    def state(self) -> dict[str, dict[str, Any]]:
        """Return the verdicts so far, for `resume`."""
        fields = ("checked", "violations", "first", "last", "counted")
        return {name: {key: getattr(each, key) for key in fields} for name, each in self.invariants.items()}

    def resume(self, state: dict[str, dict[str, Any]], turns: int) -> None:
        """Continue from the verdicts of an earlier process after `turns` turns."""
        self._turn = turns
        for name, saved in state.items():
            if name in self.invariants:
                for key, value in saved.items():
                    setattr(self.invariants[name], key, value)

    def continue_process(self, earlier: Inspector) -> None:
        """Take over the memory and times of the turns that `earlier` inspected in this process, for the trends."""
        self._process_turns, self._drifting = earlier._process_turns, set(earlier._drifting)
        for name in ("_rss", "_vram", "_first_token", "_decode", "_all_decode"):
            getattr(self, name).extend(getattr(earlier, name))

    def observe(self, event: ev.Event) -> None:
        """Track evictions; check the layers after each eviction, and everything after each turn."""
        match event:
            case ev.ModelReady(info=info):
                self._is_guarded = is_guarded(self.loop_guard, info.parameters)
            case ev.ConversationCleared():
                self.evicted = []
            case ev.TokensEvicted(runs=runs):
                self.evicted = merged_runs([*self.evicted, *runs])
            case ev.TurnsRecalled(runs=runs):
                for run in runs:
                    self.evicted = runs_without(self.evicted, *run)
            case ev.CacheAudited(after=after):
                self.audit = event
                if after in ("eviction", "page_in", "recall"):
                    self._check_lengths(event)
                if after in ("undo", "resume", "page_in"):  # earlier evictions are known only from the cache
                    self.evicted = _gaps(event.ledger, event.log_tokens)
            case ev.TurnFinished():
                self._check_turn(event)
            case _:
                pass

    def _check_turn(self, event: ev.TurnFinished) -> None:
        self._turn += 1
        self._process_turns += 1
        stats = event.stats
        if event.finish_reason == "error":
            self._check("turns", False, event.message)
            self._check("logits-finite", event.failure != "not_finite", event.message)
        else:
            self._check("turns", True)
            self._check("logits-finite", True)
        if self.audit is not None:
            self._check_lengths(self.audit, stats.cache_len)
            self._check_storage(self.audit)
            if not event.rolled_back:
                self._check_ids(self.audit)
        if stats.new_tokens:
            self._check_loop(event)
        if self._process_turns > MEMORY_WARM_UP:
            self._rss.append(stats.rss_bytes)
            if stats.vram_bytes is not None:
                self._vram.append(stats.vram_bytes)
        if self._process_turns > WARM_UP and not event.rolled_back and not self.is_disturbed():
            self._check_time(stats)
            if stats.ttft_s is not None:
                self._first_token.append((stats.prompt_tokens, stats.ttft_s))
            if stats.decode_tps and stats.new_tokens >= 4 and stats.compressions:
                self._decode.append(1 / stats.decode_tps)
        if self._turn % TREND_EVERY == 0:
            self.check_trends()

    def check_trends(self) -> None:
        """Check memory and times over the window."""
        for name, values in (("process-memory", self._rss), ("device-memory", self._vram)):
            found = trend(list(values)) if len(values) >= min(MEMORY_LEAST, MEMORY_WINDOW) else None
            if found is not None:
                bound = max(MEMORY_GROWTH_BYTES, MEMORY_GROWTH * found.median)
                self._check_trend(name, found, bound, human_bytes)
        first = trend(without_length(list(self._first_token)))
        if first is not None:
            self._check_trend("first-token-time", first, self.drift, _percent)
        decode = trend(list(self._decode))
        if decode is not None:
            usual = decode.median
            scaled = Trend(decode.change / usual, decode.low / usual, decode.high / usual, 1.0, decode.count)
            self._check_trend("decode-time", scaled, self.drift, _percent)

    # --- single checks --------------------------------------------------------------------------------------------

    def _check(self, name: str, holds: bool, detail: str = "") -> None:
        invariant = self.invariants[name]
        invariant.checked += 1
        if not holds:
            invariant.violations += 1
            invariant.first = invariant.first or f"turn {self._turn}: {detail}"
            if invariant.violations <= 3:
                self.report(Violation(name, self._turn, detail))

    def _check_trend(self, name: str, found: Trend, bound: float, words: Callable[[float], str]) -> None:
        text = (
            f"{words(found.change)} over {found.count} turns (99 % interval {words(found.low)} to {words(found.high)}; "
            f"bound {words(bound)})"
        )
        self.invariants[name].last = text
        grows = found.grows(bound)
        if not grows:
            self._drifting.discard(name)
            self._check(name, True)
        elif name not in self._drifting:  # reported once, and again only after it has recovered
            self._drifting.add(name)
            self._check(name, False, text)

    def _check_lengths(self, audit: ev.CacheAudited, reported: int | None = None) -> None:
        length = sum(stop - first for first, stop in audit.ledger)
        self._check(
            "layer-lengths",
            set(audit.lengths) == {length} and reported in (None, length) and length <= audit.cache_size,
            f"lengths: layers {_short(audit.lengths)}, ledger {length}, budget {audit.cache_size}"
            + ("" if reported is None else f", reported {reported}"),
        )

    def _check_time(self, stats: ev.TurnStats) -> None:
        """Compare with the medians of earlier turns: prefill time per token, and decode time per token."""
        took = usual = 0.0
        if stats.ttft_s is not None and len(self._first_token) >= WARM_UP:
            tokens = stats.prompt_tokens + OVERHEAD_TOKENS
            took += stats.ttft_s
            usual += tokens * statistics.median(s / (t + OVERHEAD_TOKENS) for t, s in self._first_token)
        if stats.decode_tps and len(self._all_decode) >= WARM_UP:
            took += stats.new_tokens / stats.decode_tps
            usual += stats.new_tokens * statistics.median(self._all_decode)
        if stats.decode_tps:
            self._all_decode.append(1 / stats.decode_tps)
        if usual:
            slow = took > STALL_TIMES * usual and took > usual + STALL_S
            self._check("turn-time", not slow, f"it took {took:.1f} s; the usual time for its tokens is {usual:.2f} s")

    def _check_loop(self, event: ev.TurnFinished) -> None:
        """Count the replies that repeat themselves, by their words and not by what the guard saw."""
        words, times = repeated_end(event.reply)
        is_loop, was_stopped = is_endless(words, times), event.finish_reason == "loop"
        invariant = self.invariants["loops"]
        if self._is_guarded:
            detail = f"the reply ends with the same {plural(words, 'word')} {times} times"
            self._check("loops", was_stopped or not is_loop, detail)
        invariant.counted += was_stopped or is_loop
        invariant.last = f"{plural(invariant.counted, 'reply', 'replies')} repeated themselves up to turn {self._turn}"

    def _check_storage(self, audit: ev.CacheAudited) -> None:
        now = (audit.cache_id, audit.kv_bytes)
        if self._storage is None or self._storage[0] != now[0]:
            self._storage = now
        self._check(
            "storage",
            self._storage == now,
            f"the buffers have {human_bytes(now[1])}, but had {human_bytes(self._storage[1])}",
        )

    def _check_ids(self, audit: ev.CacheAudited) -> None:
        expected = _gaps(self.evicted, audit.log_tokens)
        if list(audit.ledger) != expected:
            self._check(
                "cached-ids", False, f"cached runs {_short(audit.ledger)}, but {_short(expected)} by the events"
            )
        elif audit.turn is not None:
            detail = audit.turn.difference
            self._check("cached-ids", not detail, f"turn {audit.turn.number}: {detail}")


def _gaps(runs: Sequence[tuple[int, int]], stop: int) -> list[tuple[int, int]]:
    """Return the parts of `[0, stop)` that are not in the ascending runs."""
    out, at = [], 0
    for first, end in runs:
        if first > at:
            out.append((at, first))
        at = max(at, end)
    if at < stop:
        out.append((at, stop))
    return out


def without_length(figures: list[tuple[int, float]]) -> list[float]:
    """Divide times by a linear fit over the prompt tokens; 1.0 is usual."""
    import numpy as np

    if len(figures) < 2:
        return []
    tokens, seconds = np.array([f[0] for f in figures], float), np.array([f[1] for f in figures], float)
    if np.ptp(tokens) == 0:
        expected = np.full(len(seconds), float(np.median(seconds)))
    else:
        line = np.polyfit(tokens, seconds, 1)
        # the line may cross zero if most prompts are short
        expected = np.maximum(np.polyval(line, tokens), 0.25 * float(np.median(seconds)))
    return [float(x) for x in seconds / expected]


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %"


def _short(values: Any) -> str:
    text = str(list(values))
    return text if len(text) <= 200 else text[:120] + " ... " + text[-60:]
