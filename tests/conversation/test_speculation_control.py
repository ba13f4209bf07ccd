"""When tokens are proposed, and which: the index of n-grams, the rates, the costs, and what follows from them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.conversation.assemble import assemble
from streamchat.conversation.log import TokenLog
from streamchat.conversation.speculation import ngrams
from streamchat.conversation.speculation.acceptance import AcceptanceRates
from streamchat.conversation.speculation.costs import OBSERVATIONS, RETRY, SIZES, ForwardCosts
from streamchat.conversation.speculation.ngrams import LENGTHS, LONGEST, Match, NgramIndex, continuation
from streamchat.conversation.speculation.speculator import Speculator
from streamchat.models.load import load_model
from tests.support.kernels import needs_kernels

STEP_S = 0.004
"""Seconds of a simulated forward of one token."""
SAMPLING_S = 0.0002


@dataclass
class Simulation:
    """A text that is decoded on a simulated machine, with a speculator.

    `cost` returns the seconds of a forward of n tokens.
    """

    cost: Callable[[int], float]
    now: float = 0.0
    log: TokenLog = field(default_factory=TokenLog)
    forwards: list[int] = field(default_factory=list)
    """Tokens of each forward."""

    def __post_init__(self) -> None:
        room = SimpleNamespace(cache_size=10**9, length=0, position_limit=10**9, next_position=0)
        model = SimpleNamespace(forward=SimpleNamespace(step=SimpleNamespace(max_tokens=256)))
        feeder: Any = SimpleNamespace(
            log=self.log, cache=room, model=model, forward_proposals=lambda *given: self._forward(*given)
        )
        self.speculator = Speculator(feeder, lambda: self.now)

    def _forward(self, token: int, proposals: Sequence[int]) -> None:
        self.log.append([token])
        self.forwards.append(1 + len(proposals))
        self.now += self.cost(1 + len(proposals))

    def decode(self, text: Sequence[int]) -> float:
        """Decode all of `text`; return how many times faster that was than one token per forward."""
        started, at = self.now, 0
        self.speculator.begin_reply()
        while at < len(text) - 1:
            _, proposals = self.speculator.forward(text[at], len(text) - at - 2, ())
            first = at = at + 1
            for proposal in proposals:
                if proposal != text[at]:
                    break
                self.log.append([proposal])
                at += 1
            self.now += SAMPLING_S * (at - first + 1)
            self.speculator.learn(text[first : at + 1])
        return (len(text) - 1) * (self.cost(1) + SAMPLING_S) / (self.now - started)


def cheap(tokens: int) -> float:
    """Costs like those of the default model."""
    return STEP_S * (0.85 + 0.19 * tokens) if tokens > 1 else STEP_S


def noise(count: int, seed: int = 0) -> list[int]:
    """Tokens without repetition that helps: a few pairs occur twice."""
    rng = random.Random(seed)
    return [rng.randrange(500) for _ in range(count)]


def test_a_repeated_text_is_decoded_several_tokens_at_a_time() -> None:
    run, text = Simulation(cheap), noise(400)
    assert 0.98 < run.decode(text) < 1.02
    assert max(run.forwards) == 1
    assert run.decode(text) > 2
    assert run.speculator.accepted > 0.8 * run.speculator.proposed
    assert run.log.ids.tolist() == [*text[:-1], *text[:-1]]


def test_a_text_that_does_not_repeat_costs_at_most_two_percent() -> None:
    run = Simulation(cheap)
    assert run.decode(noise(3000)) > 0.98
    words = [random.Random(1).choice([noise(3, seed) for seed in range(60)]) for _ in range(300)]
    misleading = [token for word in words for token in (*word, random.Random(len(words)).randrange(500))]
    assert Simulation(cheap).decode(misleading) > 0.98


def test_matches_that_mislead_are_no_longer_followed() -> None:
    """A phrase of eight tokens that is always followed by another token."""
    run, text = Simulation(cheap), [token for number in range(200) for token in (*range(1, 9), 1000 + number)]
    half = len(text) // 2
    run.decode(text[:half])
    rejected, proposed = run.speculator.proposed - run.speculator.accepted, run.speculator.proposed
    assert rejected > 0
    assert run.decode(text[half:]) > 1.1
    assert run.speculator.proposed - proposed > 200
    assert run.speculator.proposed - run.speculator.accepted < rejected + 30


@pytest.mark.parametrize("slope", [0.8, 1.0, 1.5])
def test_nothing_is_proposed_if_several_tokens_cost_too_much(slope: float) -> None:
    run, text = Simulation(lambda tokens: STEP_S * (1 + slope * (tokens - 1))), noise(400)
    run.decode(text)
    run.decode(text)
    run.forwards.clear()
    speeds = [run.decode(text) for _ in range(5)]
    assert min(speeds) > (0.98 if slope >= 1 else 1.0)
    if slope >= 1:
        assert sum(count > 1 for count in run.forwards) < 0.01 * len(run.forwards)


def test_a_size_that_was_measured_on_a_busy_machine_is_tried_again() -> None:
    slow = True
    run, text = Simulation(lambda tokens: cheap(tokens) * (8 if slow and tokens > 1 else 1)), noise(400)
    run.decode(text)
    run.decode(text)
    slow = False
    for _ in range(2 * RETRY // len(text) + 2):
        run.decode(text)
    run.forwards.clear()
    assert run.decode(text) > 1.5


def test_the_number_of_proposals_grows_with_the_match() -> None:
    run, text = Simulation(cheap), noise(600)
    run.decode(text)
    run.decode([*noise(40, 5), *text[100:200]])
    sizes = [count for count in run.forwards[len(text) :] if count > 1]
    assert sizes[0] < max(sizes) <= 16
    assert sizes == sorted(sizes) or sizes[-1] >= sizes[0]


def test_proposals_end_before_control_tokens_the_limit_and_the_room() -> None:
    run, text = Simulation(cheap), list(range(100, 140))
    run.decode([*text, *noise(30)])
    for size in (4, 4, 8, 8):
        run.speculator._costs.observe(size, cheap(size))
    for matched in range(2, 40):
        for _ in range(20):
            run.speculator._rates.observe(matched, True)
    token, cache = text[20], run.speculator._feeder.cache

    def proposals(most: int, control: Sequence[int] = ()) -> list[int]:
        run.log.append(text[:20])
        found = run.speculator.forward(token, most, control)[1]
        run.log.cut(len(run.log) - 21)
        return found

    many = proposals(50)
    assert many == text[21 : 21 + len(many)]
    assert len(many) > 5
    assert proposals(50, [text[24]]) == text[21:24]
    assert proposals(2) == text[21:23]
    assert proposals(0) == []
    cache.cache_size, cache_length = cache.length + 4, cache.cache_size
    assert proposals(50) == text[21:24]
    cache.cache_size, cache.position_limit = cache_length, cache.next_position + 2
    assert proposals(50) == text[21:22]
    cache.position_limit = cache.next_position
    assert proposals(50) == []


@needs_kernels
@pytest.mark.slow
def test_the_default_model_gives_the_same_replies(default_model_home: Path) -> None:
    """Greedy, in float32, with a clock that makes forwards of several tokens as cheap as one."""
    loaded = load_model("default", device="cpu", dtype="float32")
    paragraph = "Three boats lay at the pier. A man in a yellow coat walked from one to the next and checked the ropes."
    messages = [f"Repeat this word for word: {paragraph}", "Repeat it again, with a blue coat.", "What is a pier?"]
    found = []
    for mode in ("off", "auto"):
        own: dict[str, Any] = {"speculation": mode, "cache_size": 128, "max_new_tokens": 50, "repetition_penalty": 1.0}
        settings = Settings(temperature=0.0, **own)
        made = assemble(Configuration(settings, {}), loaded, lambda event: None, lambda *_: None).conversation
        made.speculator.clock = itertools.count().__next__
        replies = [made.run_turn(message, lambda: False).reply for message in messages]
        found.append((replies, made.log.ids, made.cache.compression_count))
        made.close()
        assert (made.speculator.accepted > 20) == (mode == "auto")
    assert found[0] == found[1]
    assert "yellow coat" in found[0][0][0]
    assert found[0][2] > 0


# --- the index --------------------------------------------------------------------------------------------------------


def latest_of_longest(text: list[int]) -> Match | None:
    """Search slowly for the match that the index should find."""
    for length in LENGTHS:
        for position in range(len(text) - 2, length - 1, -1):
            if text[position - length : position] == text[-length:]:
                matched = length
                while matched < min(LONGEST, position) and text[position - matched - 1] == text[-matched - 1]:
                    matched += 1
                return Match(position, matched)
    return None


@pytest.mark.parametrize("bulk", [1, 32])
@pytest.mark.parametrize("seed", range(4))
def test_the_index_finds_the_latest_of_the_longest_matches(
    seed: int, bulk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ngrams, "BULK", bulk)
    rng, log, index, found = random.Random(seed), TokenLog(), NgramIndex(), 0
    while len(log) < 1500:
        if rng.random() < 0.3 and len(log) > 20:
            start = rng.randrange(len(log) - 10)
            piece = log.ids[start : start + rng.randrange(1, 60)].tolist()
        else:
            piece = [rng.randrange(30) for _ in range(rng.randrange(1, 12))]
        log.append(piece)
        index.update(log)
        token = rng.choice([rng.randrange(30), log.ids[rng.randrange(len(log))]])
        expected = latest_of_longest([*log.ids, token])
        match = index.find(log, token)
        assert match == expected
        found += match is not None
    assert found > 10


def test_a_text_that_was_cut_is_indexed_again() -> None:
    log, index = TokenLog(), NgramIndex()
    log.append(range(10))
    index.update(log)
    log.cut(4)
    log.append([50, 51, 52, 53, 54, 55, 56, 57, 58, 0, 1])
    index.update(log)
    assert index.find(log, 2) == Match(3, 3)
    log.append([50])
    index.update(log)
    assert index.find(log, 51) == Match(6, 2)
    assert index.find(log, 7) is None
    log.clear()
    log.append([*range(60, 80), 60])
    index.update(log)
    assert index.find(log, 61) == Match(2, 2)


def test_the_index_grows_with_the_text_and_stays_in_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngrams, "FEWEST_SLOTS", 64)
    monkeypatch.setattr(ngrams, "MOST_SLOTS", 4096)
    log, index, text = TokenLog(), NgramIndex(), noise(20_000)
    for start in range(0, len(text), 10):
        log.append(text[start : start + 10])
        index.update(log)
        assert index._slots == min(4096, index._slots)
        assert index._slots >= min(4096, 2 * len(log))
    log.append(text[-500:-400])
    assert index.find(log, text[-400]) == Match(len(text) - 399, LONGEST)


def test_the_index_of_a_very_long_text_has_a_fixed_size() -> None:
    log, index = TokenLog(), NgramIndex()
    sizes = []
    for seed in range(4):
        log.append(np.random.default_rng(seed).integers(0, 50_000, 200_000).tolist())
        index.update(log)
        sizes.append(sum(len(table) * table.itemsize for table in index._tables.values()))
    assert sizes == [3 << 20] * 4
    assert index.find(log, 0) is None
    recent = log.ids[-10_010:-10_000].tolist()
    log.append(recent[:-1])
    assert index.find(log, recent[-1]) == Match(799_999 - 10_000 + 1, 10)


def test_a_continuation_repeats_itself_past_the_end_of_the_text() -> None:
    log = TokenLog()
    log.append([9, 8, 1, 2, 3, 1])
    assert continuation(log, 2, Match(4, 2), 8) == [3, 1, 2, 3, 1, 2, 3, 1]
    assert continuation(log, 2, Match(4, 2), 1) == [3]


# --- rates and costs --------------------------------------------------------------------------------------------------


def test_rates_follow_what_was_observed_for_matches_of_that_length() -> None:
    rates = AcceptanceRates()
    before = rates.rate(16)
    for _ in range(200):
        rates.observe(2, True)
        rates.observe(5, False)
    assert rates.rate(2) > 0.95
    assert rates.rate(4) == rates.rate(5) < 0.05
    assert rates.rate(16) == before
    assert rates.rate(1000) == rates.rate(32)
    for _ in range(200):
        rates.observe(2, False)
    assert rates.rate(2) < 0.05


def test_the_expected_number_of_accepted_tokens_adds_up() -> None:
    rates = AcceptanceRates()
    first, second, third = (rates.rate(count) for count in (2, 3, 4))
    assert rates.expected(2, 3) == pytest.approx(
        [0, first, first + first * second, first + first * second * (1 + third)]
    )


def test_costs_are_medians_of_what_was_measured() -> None:
    costs = ForwardCosts()
    costs.observe(1, 50.0)
    known = [costs.known]
    for _ in range(2):
        costs.observe(1, 1.0)
        known.append(costs.known)
    assert known == [False, False, True]
    costs.observe(4, 90.0)  # also builds the program
    assert costs.cost(4) < 2
    for seconds in (1.6, 1.6, 70.0):
        costs.observe(4, seconds)
    assert costs.cost(4) == 1.6
    assert costs.cost(7) == pytest.approx(2.2)
    assert costs.speedup(4, 3.0) == pytest.approx(2.5)
    for _ in range(OBSERVATIONS):
        costs.observe_rest(0.1)
    assert costs.speedup(4, 3.0) == pytest.approx(4 * 1.1 / (1.6 + 0.4))


@pytest.mark.parametrize("ratio", [0.0, 0.4, 0.6])
def test_no_size_costs_less_than_one_token(ratio: float) -> None:
    """One token was measured on a busy machine, several ones after that."""
    costs = ForwardCosts()
    for _ in range(5):
        costs.observe(1, 0.02)
        costs.observe(4, 0.02 * ratio)
    for _ in range(5):
        costs.observe_rest(0.001)
    found = [costs.cost(tokens) for tokens in SIZES]
    assert found == sorted(found)
    assert min(found) >= 1
    assert all(1 / costs.cost(16) <= costs.speedup(tokens, 0.0) <= 1 for tokens in SIZES)
    assert costs.speedup(8, 7.0) <= 8
