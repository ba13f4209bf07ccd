"""A reply, token by token, with everything around it replaced: what is fed, shown, counted, and how it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from streamchat.base import events as ev
from streamchat.config.settings import Settings
from streamchat.conversation import generation as module
from streamchat.conversation.generation import Cancelled, Generation, TurnOutcome, close_reply
from streamchat.conversation.log import Speed, TokenLog, TurnRecord
from streamchat.conversation.sampling import REPETITION_WINDOW

END = 9
"""Ends a reply."""
ROW = torch.zeros(12)


class FakeText:
    """Shows each id as a digit; holds the newest back. Stops at the id 8."""

    def __init__(self) -> None:
        self.written, self.shown, self.stopped = "", "", False

    def ended_by(self, token: int) -> bool:
        return token == END

    def push(self, token: int) -> str:
        self.written += str(token)
        self.stopped = token == 8
        return self._show(len(self.written) - 1)

    def finish(self) -> str:
        return self._show(len(self.written))

    def _show(self, count: int) -> str:
        piece, self.shown = self.written[len(self.shown) : count], self.written[:count]
        return piece

    def kept(self) -> Any:
        return SimpleNamespace(tokens=len(self.written), rest="")


class Run:
    """A generation of turn 3, whose prompt is 5 ids from log index 7 on; notes each call in order."""

    def __init__(self, script: Iterable[int] = (), *, most: int = 20, **more: Any) -> None:
        self.calls: list[Any] = []
        self.log = TokenLog()
        self.log.append(range(7))
        self.cache: Any = SimpleNamespace(cache_size=64, length=12, num_retained=4, begin_turn=self.note("begin_turn"))
        self.encoder: Any = SimpleNamespace(control_ids={5}, close=self.close)
        self.turn = TurnRecord(3, 7, 8)
        self.text: Any = FakeText()
        self.cancelled: Callable[[], bool] = lambda: False
        self.script, self.recent = list(script), list[list[int]]()
        settings = Settings(max_new_tokens=most, on_full=more.pop("on_full", "evict"))
        self.generation = Generation(
            self, self.encoder, self.turn, self.text, settings, self.emit, lambda: self.cancelled(), 100.0, **more  # type: ignore[arg-type]
        )  # fmt: skip

    def note(self, name: str) -> Callable[..., None]:
        return lambda *given: self.calls.append((name, *given))

    def emit(self, event: ev.Event) -> None:
        text = event.text if isinstance(event, ev.TextDelta) else event
        assert getattr(event, "turn", 3) == 3
        self.calls.append(("show", text))

    def close(self, before: str = ".", rest: str = "") -> list[int]:
        self.calls.append(("close", before, rest))
        return [70, 71]

    def sample(self, logits: Tensor, recent: Sequence[int]) -> int:
        self.recent.append(list(recent))
        return self.script.pop(0)

    # the feeder

    def feed(self, ids: Sequence[int], after_chunk: Callable[[int], None] = lambda done: None) -> Tensor:
        for done in range(0, len(ids), 2):
            after_chunk(done)
            self.log.append(ids[done : done + 2])
        after_chunk(len(ids))
        self.calls.append(("feed", list(ids)))
        return ROW

    def forward(self, ids: Sequence[int]) -> Tensor:
        self.calls.append(("forward", *ids))
        self.log.append(ids)
        return ROW

    def accept(self, token: int) -> None:
        self.log.append([token])

    def cut(self, stop: int) -> None:
        self.calls.append(("cut", stop))
        self.log.cut(stop)

    def drop_rejected(self) -> None:
        self.calls.append("drop")

    def generate(self) -> TurnOutcome:
        self.log.append(range(5))  # the prompt
        return self.generation.generate(ROW, self.sample)

    def of(self, name: str) -> list[Any]:
        return [each[1] for each in self.calls if each[0] == name]


# --- the prompt -----------------------------------------------------------------------------------------------------


def test_each_chunk_of_a_prompt_is_emitted_and_may_be_the_last() -> None:
    run, asked = Run(most=6), list[int]()
    run.cancelled = lambda: asked.append(len(run.log)) or False  # type: ignore[func-returns-value]
    assert run.generation.prefill([1, 2, 3, 4, 5], 9) is ROW
    assert run.of("show") == [ev.PrefillProgress(3, done, 5) for done in (2, 4, 5)]
    assert asked == [7, 9, 11]  # before each chunk
    assert run.calls[0] == ("begin_turn", 5, 9)
    run = Run(most=6)
    run.generation.prefill([1, 2])
    assert run.calls[0] == ("begin_turn", 2, 6)
    run = Run(most=600)
    run.generation.prefill([1, 2])
    assert run.calls[0] == ("begin_turn", 2, (64 - 4) // 4)
    for after in (0, 1):
        run, answers = Run(), iter([False] * after + [True] * 9)
        run.cancelled = lambda answers=answers: next(answers)  # type: ignore[misc]
        with pytest.raises(Cancelled):
            run.generation.prefill([1, 2, 3], 9)
        assert len(run.log) == 7 + 2 * after


# --- how a reply ends -----------------------------------------------------------------------------------------------


def test_a_reply_is_fed_up_to_its_end_token_and_closed() -> None:
    run = Run([1, 2, 3, END])
    outcome = run.generate()
    assert outcome == TurnOutcome(3, "123", "stop", 5, 3, run.generation.speed, False, "", "")
    assert outcome.speed is run.generation.speed
    assert run.of("forward") == [1, 2, 3]
    assert "".join(run.of("show")) == "123"
    assert run.of("show") == ["1", "2", "3"]
    assert run.calls[-2:] == [("close", "123", ""), ("feed", [70, 71])]
    assert (run.turn.end, run.turn.reply, len(run.log)) == (17, "123", 17)


@pytest.mark.parametrize("most", [1, 3])
def test_a_reply_ends_at_its_limit_and_its_newest_token_is_fed_with_the_close(most: int) -> None:
    run, asked = Run([1, 2, 3, 4], most=most), list[int]()
    run.cancelled = lambda: asked.append(1) or False  # type: ignore[func-returns-value]
    outcome = run.generate()
    assert (outcome.finish_reason, outcome.new_tokens, len(asked)) == ("length", most, most)
    assert run.of("forward") == [1, 2][: most - 1]
    assert run.of("feed") == [[most, 70, 71]]
    assert run.log.ids[12:].tolist() == [*range(1, most + 1), 70, 71]


@pytest.mark.parametrize(("script", "reason"), [([1, 2, 8, 3], "stop"), ([1, 4, 3], "loop"), ([4, END], "loop")])
def test_a_stop_string_or_a_loop_ends_a_reply(script: list[int], reason: str) -> None:
    seen: list[int] = []
    loops: Any = SimpleNamespace(is_loop_with=lambda token: seen.append(token) or token in (4, 8))  # type: ignore[func-returns-value]
    run = Run(script, loops=loops)
    outcome = run.generate()
    assert (outcome.finish_reason, outcome.new_tokens) == (reason, len(script) - 1)
    assert seen == script[:-1]
    if reason == "loop":
        assert Run([*script, END]).generate().finish_reason == "stop"  # without a watch


@pytest.mark.parametrize(("after", "rolled_back"), [(0, True), (1, False), (2, False)])
def test_a_stopped_reply_is_closed_unless_nothing_was_shown(after: int, rolled_back: bool) -> None:
    run, answers = Run([1, 2, 3, 4]), iter([False] * after + [True])
    run.cancelled = lambda: next(answers)
    outcome = run.generate()
    assert (outcome.finish_reason, outcome.rolled_back, outcome.new_tokens) == ("cancelled", rolled_back, after)
    assert (outcome.reply, "".join(run.of("show"))) == ("12"[:after], "12"[:after])
    assert (run.turn.end is None) == rolled_back
    assert (run.of("feed") == []) == rolled_back


def test_an_empty_reply_is_closed_and_a_given_one_is_fed_at_once() -> None:
    run = Run([END])
    outcome = run.generate()
    assert (outcome.reply, outcome.finish_reason, outcome.rolled_back) == ("", "stop", False)
    assert (run.of("feed"), run.of("show"), run.turn.end) == ([[70, 71]], [], 14)
    run = Run()
    run.log.append(range(5))
    outcome = run.generation.feed_reply("hi", [1, 2])
    assert (outcome.prompt_tokens, outcome.new_tokens, outcome.rolled_back) == (5, 0, False)
    assert (outcome.turn, outcome.reply, outcome.finish_reason, outcome.speed) == (3, "hi", "stop", Speed())
    assert TurnOutcome(1, "", "stop").prompt_tokens == 0
    assert run.calls == [("show", "hi"), ("feed", [1, 2])]
    assert (run.turn.end, run.turn.reply) == (14, "hi")
    assert Run().generation.feed_reply("", []) == TurnOutcome(3, "", "stop", 0)


def test_a_reply_that_must_not_evict_leaves_room_for_its_close() -> None:
    for on_full, most, expected in (("stop", 60, 64 - 12 - 2), ("stop", 9, 9), ("evict", 60, 60)):
        assert Run(most=most, on_full=on_full).generation._limit() == expected


# --- proposals ------------------------------------------------------------------------------------------------------


def test_proposed_tokens_are_accepted_up_to_the_first_other_one() -> None:
    offers = iter([[2, 3, 6], [], [4, 7]])
    run: Run

    def forward(token: int, most: int, control: Any) -> tuple[Tensor, list[int]]:
        proposals = next(offers)
        run.calls.append(("forward", (token, most, control)))
        run.log.append([token])
        return torch.zeros(1 + len(proposals), 12), proposals

    begun: list[str] = []

    def learn(found: list[int]) -> None:
        run.calls.append(("learn", found))

    speculator: Any = SimpleNamespace(begin_reply=lambda: begun.append("begun"), forward=forward, learn=learn)
    run = Run([1, 2, 3, 4, 5, 4, END], speculator=speculator, most=10)
    outcome = run.generate()
    assert (outcome.reply, outcome.new_tokens, outcome.finish_reason, begun) == ("123454", 6, "stop", ["begun"])
    control = run.encoder.control_ids
    assert [each for each in run.calls if each == "drop" or each[0] in ("forward", "learn", "show")] == [
        ("learn", [1]),
        *(("forward", (1, 8, control)), "drop", ("learn", [2, 3, 4]), ("show", "123")),
        *(("forward", (4, 5, control)), ("learn", [5]), ("show", "4")),
        *(("forward", (5, 4, control)), "drop", ("learn", [4, END]), ("show", "5")),
        ("show", "4"),
    ]
    assert run.log.ids[12:].tolist() == [1, 2, 3, 4, 5, 4, 70, 71]


# --- what a token is sampled from, and when ---------------------------------------------------------------------------


def test_the_sampler_sees_the_newest_ids_without_control_tokens() -> None:
    run = Run([1, END])
    run.log.append([*range(20, 20 + REPETITION_WINDOW), 5])
    newest = [*range(20, 20 + REPETITION_WINDOW), 5, 0, 1, 2, 3, 4]
    run.generate()
    assert run.recent[0] == [each for each in newest[-REPETITION_WINDOW:] if each != 5]
    assert run.recent[1] == [each for each in [*newest, 1][-REPETITION_WINDOW:] if each != 5]


def test_the_speed_is_measured_from_the_start_of_the_turn_and_from_its_first_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([103.0, 103.5, 105.0])
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    run = Run([1, 2, END])
    assert run.generation.speed == Speed()
    run.generate()
    assert (run.generation.speed.ttft_s, run.generation.speed.decode_tps) == (3.0, 2 / 2.0)


@pytest.mark.parametrize("fed", [2, 3, 4])
def test_the_close_follows_the_ids_whose_text_is_shown(fed: int) -> None:
    """Of five ids, three stay, and the last sign of the text is encoded again."""
    run = Run()
    run.log.append(range(fed))
    text: Any = SimpleNamespace(kept=lambda: SimpleNamespace(tokens=3, rest="c"), written="abc", shown="abc!")
    close_reply(run, run.encoder, run.turn, text, [1, 2, 3, 4, 5], 7)  # type: ignore[arg-type]
    assert run.calls == [
        *[("cut", 10)] * (fed > 3),
        ("close", "ab", "c"),
        ("feed", [*[3] * (fed == 2), 70, 71]),
    ]
    assert (run.turn.end, run.turn.reply) == (12, "abc!")
