"""The cache of the scripted engine: the product's own ledger, policy and segments, without tensors."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from streamchat.base import events as ev
from streamchat.cache.eviction.guard import plan_cuts
from streamchat.cache.eviction.ledger import Ledger
from streamchat.cache.eviction.policies.oldest_turns import OldestTurns
from streamchat.cache.eviction.policy import CacheView, Retention, merged_runs
from streamchat.conversation.log import TokenLog, TurnRecord
from streamchat.conversation.segments import segments

KV_BYTES_PER_TOKEN = 46_080


@dataclass
class ScriptedCache:
    """What a pretended cache holds. The first `num_sink_tokens + system_tokens` tokens are the system block."""

    cache_size: int
    num_sink_tokens: int
    system_tokens: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    log: TokenLog = field(default_factory=TokenLog)
    pins: tuple[tuple[int, int], ...] = ()
    compressions: int = 0
    marks: list[tuple[list[tuple[int, int]], int, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        block = self.num_sink_tokens + self.system_tokens
        self.append(block)
        self.pins = ((0, block),)

    @property
    def length(self) -> int:
        """Tokens held."""
        return len(self.ledger)

    @property
    def room(self) -> int:
        """Tokens beside what never leaves."""
        return self.cache_size - self.retention.retained_count(self.ledger)

    @property
    def retention(self) -> Retention:
        """What never leaves."""
        return Retention(self.cache_size, self.num_sink_tokens, self.pins)

    def begin(self, text: str, prompt: int) -> TurnRecord:
        """A turn of `prompt` tokens begins."""
        at = len(self.log)
        turn = TurnRecord(len(self.log.turns) + 1, at, at, reply_start=at + prompt, text=text)
        self.log.turns.append(turn)
        return turn

    def append(self, count: int) -> None:
        """Feed tokens; there must be room."""
        self.log.append([0] * count)
        self.ledger.append(count)

    def end(self, turn: TurnRecord) -> None:
        """The turn is over."""
        turn.end = len(self.log)

    def mark(self) -> None:
        """A turn will be announced; `take_back` comes back here."""
        self.marks.append((list(self.ledger.runs), self.ledger.next_index, self.compressions, len(self.log.turns)))

    def take_back(self) -> None:
        """Leave no trace of the newest turn."""
        runs, self.ledger.next_index, self.compressions, turns = self.marks.pop()
        self.ledger.runs = runs
        self.log.cut(self.ledger.next_index)
        del self.log.turns[turns:]

    def make_room(self, incoming: int, reserve: int, trigger: ev.Trigger) -> ev.TokensEvicted | None:
        """Evict what is due; returns what to tell."""
        before = self.length
        starts = tuple(turn.start for turn in self.log.turns) if trigger == "between_turns" else ()
        retained = tuple(self.retention.retained_slots(self.ledger))
        view = CacheView(self.ledger, retained, self.cache_size, incoming, reserve, starts)
        cuts = plan_cuts(OldestTurns(), view)
        dropped = [run for cut in cuts for run in self.ledger.evict(cut.at, cut.count)]
        if not dropped:
            return None
        self.compressions += 1
        lost = {turn.number: turn for run in dropped for turn in self.log.turns_touching(*run)}
        state = self.state()
        held = {segment.turn for segment in state.segments}
        return ev.TokensEvicted(
            count=sum(stop - first for first, stop in dropped),
            token_range=(dropped[0][0], dropped[-1][1]),
            turns=tuple(lost),
            turns_gone=tuple(n for n, turn in lost.items() if turn.end is not None and n not in held),
            cache_len_before=before,
            cache_len_after=self.length,
            trigger=trigger,
            cache=state,
        )

    def set_pin(self, number: int, pinned: bool) -> int:
        """Pin or unpin a whole turn; returns how much of it is held, 0 where there is nothing to pin."""
        if not 1 <= number <= len(self.log.turns):
            return 0
        turn = self.log.turns[number - 1]
        stop = len(self.log) if turn.end is None else turn.end
        if pinned:
            self.pins = tuple(merged_runs([*self.pins, (turn.start, stop)]))
        else:
            parts = [(a, min(b, turn.start)) for a, b in self.pins] + [(max(a, stop), b) for a, b in self.pins]
            self.pins = tuple(merged_runs(part for part in parts if part[0] < part[1]))
        return self.ledger.count_in(turn.start, stop)

    def state(self) -> ev.CacheState:
        """As the engine tells it."""
        evicted = self.ledger.next_index - self.length
        sinks = min(self.length, self.num_sink_tokens)
        pinned = self.retention.retained_count(self.ledger) - sinks
        first_kept = self.ledger.index_at(self.retention.prefix(self.ledger))
        return ev.CacheState(
            length=self.length,
            cache_size=self.cache_size,
            sinks=sinks,
            pinned=pinned,
            window=self.length - sinks - pinned,
            compressions=self.compressions,
            tokens_evicted=evicted,
            tokens_seen=self.ledger.next_index,
            kv_bytes=self.cache_size * 5 // 4 * KV_BYTES_PER_TOKEN,
            full_kv_bytes=self.ledger.next_index * KV_BYTES_PER_TOKEN,
            first_visible_turn=self.log.first_turn_from(first_kept) if evicted else 0,
            segments=segments(self.ledger, self.log, sinks=self.num_sink_tokens, pins=self.pins),
        )

    def fresh(self, system_tokens: int) -> ScriptedCache:
        """An empty one of the same size."""
        return replace(
            self, system_tokens=system_tokens, ledger=Ledger(), log=TokenLog(), pins=(), compressions=0, marks=[]
        )
