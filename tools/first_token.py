"""CPU time from the start of a turn to its first token, early and late in a long chat.

    python -m tools.first_token                      # turns 5-15 and 490-500 of the default model
    python -m tools.first_token --profile            # and where late turns spend it

All turns run in one process on one cache, with a generated reply each. The clock is the CPU time of the thread that
runs the model, so other programs change it little.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from streamchat.base import events as ev
from streamchat.cache.history import evicted_by
from streamchat.cache.paging import page_in
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.conversation.assemble import StartedConversation, assemble, load_from_settings
from streamchat.conversation.conversation import Conversation
from streamchat.conversation.generation import TurnOutcome
from streamchat.sessions.archive import Archive
from streamchat.store.store import Store

EARLY, LATE = (5, 15), (490, 500)


class FirstTokens:
    """Measures the CPU time to the first text of each turn; receives the events of a conversation."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        """One per turn, from its start to its first text."""
        self.evicting: list[bool] = []
        """Whether the turn evicted before its first text."""
        self._started: float | None = None
        self._evicted = False

    def start(self) -> None:
        """Start a turn."""
        self._started, self._evicted = time.thread_time(), False

    def __call__(self, event: ev.Event) -> None:
        """Receive an event."""
        if isinstance(event, ev.TokensEvicted):
            self._evicted = True
        if isinstance(event, ev.TextDelta) and self._started is not None:
            self.times_s.append(time.thread_time() - self._started)
            self.evicting.append(self._evicted)
            self._started = None


def median_ms(first: FirstTokens, turns: tuple[int, int]) -> float:
    """Return the median of these turns, first and last included."""
    return 1000 * statistics.median(first.times_s[turns[0] - 1 : turns[1]])


def finished(outcome: TurnOutcome, conversation: Conversation) -> ev.TurnFinished:
    """Return the event that ends a turn."""
    state = conversation.state()
    stats = ev.TurnStats(
        turn=outcome.turn,
        prompt_tokens=outcome.prompt_tokens,
        new_tokens=outcome.new_tokens,
        cache_len=state.length,
        cache_size=state.cache_size,
        compressions=state.compressions,
        tokens_evicted=state.tokens_evicted,
        ttft_s=None,
        decode_tps=None,
        kv_bytes=state.kv_bytes,
        rss_bytes=0,
        vram_bytes=None,
        finish_reason=outcome.finish_reason,
    )
    return ev.TurnFinished(stats, outcome.finish_reason, outcome.reply)


def message(number: int) -> str:
    """Return the message of a turn, of about 15 tokens."""
    words = ("river", "engine", "garden", "letter", "winter", "market", "island", "copper")
    return f"What about the {words[number % 8]} and the {words[number * 3 % 7]}?"


def chat(started: StartedConversation, archive: Archive, first: FirstTokens, turns: int, profile: Any) -> None:
    """Run the turns; the late ones under `profile`, if it is not None."""
    conversation = started.conversation
    for number in range(1, turns + 1):
        if profile is not None and number == turns - 20:
            profile.enable()
        first.start()
        outcome = conversation.run_turn(message(number), lambda: False)
        if len(first.times_s) < number:  # an empty reply
            first.times_s.append(first.times_s[-1])
            first.evicting.append(False)
        archive.record(finished(outcome, conversation))
        if number % 50 == 0:
            print(f"turn {number}: {1000 * first.times_s[-1]:.1f} ms", file=sys.stderr, flush=True)
    if profile is not None:
        profile.disable()


def paging_ms(conversation: Conversation, tokens: int = 100) -> tuple[int, float]:
    """Return how many tokens were paged in at once, and the median CPU time of that, without the eviction before."""
    cache, times, count = conversation.cache, list[float](), 0
    assert cache.history is not None
    for _ in range(9):
        conversation.feeder.feed(conversation.log.ids[-tokens:].tolist())
        cache.make_room(tokens)
        kept = [evicted for step in cache.history.since(0) if (evicted := evicted_by(step)) is not None]
        first, stop = kept[-1].runs[0]
        started = time.thread_time()
        count = page_in(cache, kept, [(first, min(stop, first + tokens))])
        times.append(time.thread_time() - started)
    return count, 1000 * statistics.median(times)


def main() -> int:
    """Run the chat and print the medians."""
    parser = argparse.ArgumentParser(prog="python -m tools.first_token", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--cache-size", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=LATE[1])
    parser.add_argument("--reply", type=int, default=16, help="maximum tokens per reply (default: 16)")
    parser.add_argument("--profile", action="store_true", help="profile the last 20 turns")
    options = parser.parse_args()
    settings = Settings(
        model=options.model, cache_size=options.cache_size, max_new_tokens=options.reply, temperature=0.7, seed=1
    )
    configuration = Configuration(settings, {"cache_size": "flag"})
    loaded = load_from_settings(configuration, lambda *_: None)
    first = FirstTokens()
    with tempfile.TemporaryDirectory() as folder:
        archive = Archive(lambda: Store(Path(folder) / "chats.db"), lambda event: None)
        archive.open(required=True)

        def emit(event: ev.Event) -> None:
            archive.record(event)
            first(event)

        started = assemble(configuration, loaded, emit, lambda *_: None)
        archive.start(started)
        profile = cProfile.Profile(time.thread_time) if options.profile else None
        chat(started, archive, first, options.turns, profile)
        archive.close()
        paged, page_ms = paging_ms(started.conversation)
    late = (max(1, options.turns - 10), options.turns)
    rows = {
        "turns 5-15": median_ms(first, EARLY),
        f"turns {late[0]}-{late[1]}": median_ms(first, late),
        "first evicting 20": 1000
        * statistics.median([t for t, e in zip(first.times_s, first.evicting, strict=True) if e][:20] or [0]),
    }
    for name, value in rows.items():
        print(f"{name}: {value:.1f} ms")
    print(f"late / early: {rows[f'turns {late[0]}-{late[1]}'] / rows['turns 5-15']:.2f}")
    print(f"paging {paged} tokens in: {page_ms:.1f} ms")
    if profile is not None:
        pstats.Stats(profile).sort_stats("cumulative").print_stats(45)
    return 0


if __name__ == "__main__":
    sys.exit(main())
