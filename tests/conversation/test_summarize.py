"""Which turns a summary is about, what the model is asked, and which of its replies are a summary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError, TurnError
from streamchat.config.settings import Settings
from streamchat.conversation.generation import TurnOutcome
from streamchat.conversation.summarize import next_to_evict, summarize


def segment(turn: int, tokens: int, pinned: bool = False) -> ev.Segment:
    return ev.Segment("user" if turn else "system", turn, tokens, tokens, pinned)


BLOCK = segment(0, 50, True)


@pytest.mark.parametrize(
    ("segments", "turns"),
    [
        ([], None),
        ([BLOCK], None),
        ([BLOCK, segment(1, 99, True)], None),
        ([BLOCK, segment(2, 10)], (2, 2)),
        ([BLOCK, segment(1, 49), segment(2, 1), segment(3, 9)], (1, 2)),  # half of a window of 100
        ([BLOCK, segment(1, 49), segment(2, 0), segment(3, 9), segment(4, 9)], (1, 3)),
        ([BLOCK, segment(1, 60), segment(1, 60), segment(2, 9)], (1, 1)),  # the whole turn
        ([BLOCK, segment(1, 60, True), segment(2, 30), segment(3, 80, True), segment(4, 9), segment(5, 9)], (2, 5)),
        ([segment(0, 99), segment(1, 9), segment(2, 9)], (1, 2)),
    ],
)
def test_the_oldest_turns_that_fill_half_of_the_window(
    segments: list[ev.Segment], turns: tuple[int, int] | None
) -> None:
    assert next_to_evict(tuple(segments), 100) == turns


class Asked:
    """A conversation whose next reply is known; it notes what happens to it."""

    def __init__(self, outcome: TurnOutcome, *segments: ev.Segment, cache_size: int = 800, **settings: Any) -> None:
        self.outcome, self.steps = outcome, list[Any]()
        self.settings = Settings(**settings)
        texts = ["Once  upon\na time", "b" * 70, "The end."]
        self.log = SimpleNamespace(turns=[SimpleNamespace(text=text) for text in texts])
        self._state = SimpleNamespace(segments=segments, window=100, cache_size=cache_size)

    def state(self) -> Any:
        return self._state

    @contextmanager
    def muted(self, settings: Settings) -> Iterator[None]:
        self.steps.append((settings.max_new_tokens, settings.temperature))
        yield
        self.steps.append("loud")

    def run_turn(self, question: str, cancelled: Any) -> TurnOutcome:
        self.steps.append(question)
        assert not cancelled()
        return self.outcome

    def undo(self) -> None:
        self.steps.append("undo")

    def summary(self) -> tuple[ev.SummaryReady, list[ev.Event]]:
        emitted: list[ev.Event] = []
        return summarize(self, lambda: False, emitted.append), emitted  # type: ignore[arg-type]


def outcome(reply: str, reason: ev.FinishReason = "stop", **more: Any) -> TurnOutcome:
    return TurnOutcome(4, reply, reason, **more)


@pytest.mark.parametrize(
    ("segments", "turns", "which", "start", "end"),
    [
        ([segment(1, 50)], (1, 1), "turn 1", "Once upon a time", "Once upon a time"),
        ([segment(1, 40), segment(2, 40), segment(3, 9)], (1, 2), "turns 1 to 2", "Once upon a time", "b" * 60),
        ([segment(2, 40), segment(3, 9)], (2, 3), "turns 2 to 3", "b" * 60, "The end."),
    ],
)
def test_the_model_is_asked_about_these_turns_and_the_turn_is_undone(
    segments: list[ev.Segment], turns: tuple[int, int], which: str, start: str, end: str
) -> None:
    chat = Asked(outcome("<think>Hm.</think>\n They talked. \n"), *segments, temperature=0.7)
    ready, emitted = chat.summary()
    assert ready == ev.SummaryReady("They talked.", turns)
    assert emitted == [ev.Notice(f"Summarizing {which}, next to be evicted …")]
    limits, question, *rest = chat.steps
    assert limits == (100, 0.0)  # an eighth of the cache, greedily
    assert f'from where I said "{start}" to where I said "{end}", in at most 50 words.' in question
    assert rest == ["undo", "loud"]


@pytest.mark.parametrize(
    ("cache_size", "most", "tokens", "words"), [(80, 512, 16, 8), (160, 512, 20, 10), (800, 30, 30, 50)]
)
def test_the_length_of_a_summary(cache_size: int, most: int, tokens: int, words: int) -> None:
    chat = Asked(outcome("Short."), segment(1, 50), cache_size=cache_size, max_new_tokens=most)
    chat.summary()
    assert chat.steps[0] == (tokens, 0.0)
    assert f"in at most {words} words" in chat.steps[1]


def test_nothing_to_summarize() -> None:
    chat = Asked(outcome("Short."), BLOCK)
    with pytest.raises(ConfigError, match="nothing to summarize"):
        chat.summary()
    assert chat.steps == []


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (outcome("They", "cancelled"), "the summary was stopped"),
        (outcome("<think>Hm.</think>\n", new_tokens=12), "reasoned for 12 tokens and returned no summary"),
        (outcome(" \n"), "the model returned no summary; nothing"),
    ],
)
def test_a_reply_without_a_summary_is_refused_and_undone(result: TurnOutcome, message: str) -> None:
    chat = Asked(result, segment(1, 50))
    with pytest.raises(TurnError, match=message):
        chat.summary()
    assert chat.steps[2:] == ["undo", "loud"]


def test_a_turn_that_was_rolled_back_is_not_undone_again() -> None:
    chat = Asked(outcome("", "cancelled", rolled_back=True), segment(1, 50))
    with pytest.raises(TurnError, match="stopped"):
        chat.summary()
    assert chat.steps[2:] == ["loud"]
