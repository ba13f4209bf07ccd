"""Measures recall: right digits by distance, and what it costs in time and perplexity."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from streamchat.base import events as ev
from streamchat.base.progress import Progress
from streamchat.benchmarks.recall.filler import DIGITS, NOTED, Fact
from streamchat.benchmarks.recall.forced import ForcedChat, Scores, Way

WAYS: tuple[Way, ...] = ("off", "text", "by hand", "on")
SPREAD = 512
"""Maximum tokens between two facts."""
WARM_UP = 2
"""Turns of ordinary chat that are not scored."""


@dataclass
class DigitFigures:
    """Results of one way at one distance."""

    way: str
    distance: int
    nats: list[float] = field(default_factory=list)
    """Nats per digit of each fact."""
    exact: int = 0
    """Facts with all digits right."""

    @property
    def mean(self) -> float:
        """Mean nats per digit."""
        return statistics.fmean(self.nats) if self.nats else math.nan


@dataclass(frozen=True)
class CostFigures:
    """What automatic recall costs in ordinary chat."""

    turns: int
    recalled: int
    """Turns for which something was recalled."""
    tokens: int
    perplexity_off: float
    perplexity_on: float


@dataclass(frozen=True)
class TimeFigures:
    """Time to the first token of questions about evicted turns, alternately without and with recall."""

    turns: int
    """Turns of the conversation."""
    off_s: list[float]
    on_s: list[float]
    off_cpu_s: list[float]
    """CPU time of the thread that runs the model, for the turn with one token of reply."""
    on_cpu_s: list[float]
    tokens: float
    """Mean number of tokens that were paged in."""


def measure_digits(
    chat: ForcedChat,
    facts: Sequence[Fact],
    distances: Sequence[int],
    filler: Iterator[tuple[str, str]],
    progress: Progress,
) -> list[DigitFigures]:
    """State all facts, spread over one conversation, and ask for each at every distance in every way.

    Args:
        chat: A new conversation.
        facts: The facts.
        distances: Ascending numbers of tokens between a fact and its question.
        filler: Turns for the distance.
        progress: Shows the progress.
    """
    figures = {(way, distance): DigitFigures(way, distance) for distance in distances for way in WAYS}
    gap = min(SPREAD, max(distances) // len(facts))
    left = [(fact, number * gap) for number, fact in enumerate(facts)]
    asks: list[tuple[int, int, Fact, int]] = []
    last = left[-1][1] + max(distances)
    while left or asks:
        progress("Recalling digits", chat.tokens, last, "")
        if left and chat.tokens >= left[0][1]:
            fact, _ = left.pop(0)
            turn = chat.say(fact.statement, NOTED)
            asks += [(chat.tokens + distance, distance, fact, turn.number) for distance in distances]
            asks.sort(key=lambda ask: ask[0])
        elif asks and chat.tokens >= asks[0][0]:
            _, distance, fact, number = asks.pop(0)
            for way in WAYS:
                _add(figures[way, distance], chat, fact, chat.score(fact.question, fact.answer, way, number))
        else:
            chat.say(*next(filler))
    return list(figures.values())


def measure_dense(
    chat: ForcedChat,
    facts: Sequence[Fact],
    distances: Sequence[int],
    filler: Iterator[tuple[str, str]],
    progress: Progress,
) -> list[DigitFigures]:
    """Ask for each fact at every distance in a conversation that evicts nothing."""
    figures = [DigitFigures("dense", distance) for distance in distances]
    for done, fact in enumerate(facts):
        progress("Asking a dense cache", done, len(facts), "")
        chat.start_over()
        chat.say(fact.statement, NOTED)
        start = chat.tokens
        for each in figures:
            while chat.tokens - start < each.distance:
                chat.say(*next(filler))
            _add(each, chat, fact, chat.score(fact.question, fact.answer))
    return figures


def _add(figures: DigitFigures, chat: ForcedChat, fact: Fact, scores: Scores) -> None:
    ids = chat.tokenizer(fact.answer, add_special_tokens=False)["input_ids"]
    digits = [at for at, token in enumerate(ids) if any(sign.isdigit() for sign in chat.tokenizer.decode([token]))]
    figures.nats.append(sum(scores.nats[at] for at in digits) / DIGITS)
    figures.exact += all(scores.is_first[at] for at in digits)


def measure_time(chat: ForcedChat, facts: Sequence[Fact]) -> TimeFigures:
    """Time the first token of the questions for `facts`, which `chat` has evicted."""
    scores: dict[Way, list[Scores]] = {"off": [], "on": []}
    tokens = list[int]()
    for number, fact in enumerate(facts):
        ways: tuple[Way, ...] = ("off", "on") if number % 2 else ("on", "off")
        for way in ways:
            chat.events.clear()
            scores[way].append(chat.score(fact.question, fact.answer, way, most=1))
            tokens += [event.tokens for event in chat.events if isinstance(event, ev.TurnsRecalled)]
    off, on = scores["off"], scores["on"]
    return TimeFigures(
        turns=len(chat.conversation.log.turns),
        off_s=[each.ttft_s for each in off],
        on_s=[each.ttft_s for each in on],
        off_cpu_s=[each.cpu_s for each in off],
        on_cpu_s=[each.cpu_s for each in on],
        tokens=statistics.fmean(tokens) if tokens else 0.0,
    )


def measure_cost(
    chat: ForcedChat, filler: Iterator[tuple[str, str]], turns: int, reply_tokens: int, progress: Progress
) -> CostFigures:
    """Score the replies of an ordinary chat without and with recall.

    Args:
        chat: A new conversation.
        filler: Its turns.
        turns: How many of them.
        reply_tokens: Tokens of each reply that are scored.
        progress: Shows the progress.
    """
    off, on, recalled, scored = list[float](), list[float](), 0, 0
    for number in range(turns):
        progress("Scoring ordinary chat", number, turns, "")
        message, reply = next(filler)
        if number >= WARM_UP:
            scored += 1
            plain = chat.score(message, reply, "off", most=reply_tokens)
            other = plain
            if chat.conversation.auto_recall.candidates(message):
                other = chat.score(message, reply, "on", most=reply_tokens)
                recalled += bool(other.recalled)
            off += plain.nats
            on += other.nats
        chat.say(message, reply)
    return CostFigures(scored, recalled, len(off), math.exp(statistics.fmean(off)), math.exp(statistics.fmean(on)))
