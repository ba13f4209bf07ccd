"""Estimates of speculation against their definitions: rates of acceptance, costs of forwards, and what is reset."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from streamchat.conversation.log import TokenLog
from streamchat.conversation.speculation import acceptance
from streamchat.conversation.speculation.acceptance import AcceptanceRates, _bucket
from streamchat.conversation.speculation.costs import RETRY, ForwardCosts, RunningMedian
from streamchat.conversation.speculation.speculator import SINGLE_EVERY, Speculator

TABLE = [(2, 0.1), (3, 0.2), (4, 0.3), (6, 0.45), (8, 0.6), (12, 0.75), (16, 0.85), (24, 0.9), (32, 0.95)]


def test_each_length_of_a_match_belongs_to_the_next_lower_estimate() -> None:
    assert list(zip(acceptance.BUCKETS, acceptance.ASSUMED, strict=True)) == TABLE
    for matched in range(1, 40):
        expected = max([at for at, (least, _) in enumerate(TABLE) if least <= matched], default=0)
        assert _bucket(matched) == expected
        assert AcceptanceRates().rate(matched) == pytest.approx(TABLE[expected][1])


def test_a_rate_is_a_decaying_mean_that_starts_with_four_assumed_observations() -> None:
    rates, accepted, observed = AcceptanceRates(), 0.3 * 4, 4.0
    for hit in (True, True, False, True):
        rates.observe(5, hit)
        accepted, observed = 0.98 * accepted + hit, 0.98 * observed + 1
        assert rates.rate(4) == rates.rate(5) == pytest.approx(accepted / observed)
    assert [rates.rate(3), rates.rate(6)] == pytest.approx([0.2, 0.45])


def test_the_expected_number_is_the_sum_of_the_probabilities_to_get_so_far() -> None:
    assert AcceptanceRates().expected(4, 0) == [0.0]
    assert AcceptanceRates().expected(4, 3) == pytest.approx([0.0, 0.3, 0.3 + 0.3**2, 0.3 + 0.3**2 + 0.3**2 * 0.45])


def test_a_median_is_of_the_last_15_values() -> None:
    values = RunningMedian()
    assert (values.value, len(values)) == (0.0, 0)
    for value in (1.0, 3.0):
        values.add(value)
    assert values.value == 2.0
    for _ in range(8):
        values.add(100.0)
    assert (values.value, len(values)) == (100.0, 10)
    for _ in range(8):
        values.add(7.0)
    assert (values.value, len(values)) == (7.0, 15)
    values.clear()
    assert (values.value, len(values)) == (0.0, 0)


def measured(*sizes: tuple[int, float], single: float = 2.0) -> ForwardCosts:
    """Costs after three forwards of one token, and two of each of these sizes."""
    costs = ForwardCosts()
    for _ in range(3):
        costs.observe(1, single)
    for size, seconds in sizes:
        costs.observe(size, 1000.0)  # builds its program
        costs.observe(size, seconds)
    return costs


def test_costs_are_known_after_three_single_forwards() -> None:
    costs = ForwardCosts()
    for known in (False, False, True):
        costs.observe(1, 2.0)
        costs.observe(4, 2.0)
        assert costs.known is known


def test_unmeasured_costs_are_assumed_or_in_proportion_to_the_nearest_size() -> None:
    costs = measured()
    assert [costs.cost(size) for size in (1, 2, 5)] == [1.0, 1.25, 2.0]
    assert costs.largest == 4
    costs = measured((4, 5.0), (8, 4.0))
    assert [costs.cost(size) for size in (1, 4, 8)] == [1.0, 2.5, 2.0]
    assert costs.cost(3) == pytest.approx(1 + 1.5 * 2 / 3)
    assert costs.cost(12) == pytest.approx(1 + 1.0 * 11 / 7)
    assert costs.largest == 16


def test_a_new_measurement_replaces_the_computed_cost() -> None:
    costs = measured((4, 5.0))
    assert costs.cost(4) == 2.5
    costs.observe(4, 7.0)
    assert costs.cost(4) == 3.0  # the median of both


def test_the_first_forward_of_a_size_and_those_without_a_unit_do_not_count() -> None:
    costs = ForwardCosts()
    for _ in range(3):
        costs.observe(4, 9.0)
    assert costs.largest == 4
    for _ in range(3):
        costs.observe(1, 2.0)
    assert costs.cost(4) == 1.75
    costs.observe(4, 9.0)
    assert (costs.cost(4), costs.largest) == (4.5, 8)


def test_the_speedup_counts_the_time_outside_of_forwards() -> None:
    costs = measured((4, 5.0))
    assert costs.speedup(4, 2.0) == pytest.approx(3 / 2.5)
    costs.observe_rest(1.0)  # half of a forward
    assert costs.speedup(4, 2.0) == pytest.approx(3 * 1.5 / (2.5 + 3 * 0.5))
    assert ForwardCosts().speedup(4, 2.0) == pytest.approx(3 / 1.75)


def test_a_size_that_was_not_used_for_long_is_forgotten() -> None:
    costs = measured((4, 5.0), (8, 5.0))
    for _ in range(RETRY - costs._forwards - 2):
        costs.observe(1, 2.0)
    costs.observe(8, 5.0)
    assert costs.largest == 16
    costs.observe(1, 2.0)
    assert costs._forwards == RETRY
    assert costs.largest == 16  # used less than 1,024 forwards ago
    for _ in range(RETRY - 2):
        costs.observe(1, 2.0)
    costs.observe(8, 5.0)
    costs.observe(1, 2.0)
    assert costs._forwards == 2 * RETRY
    assert costs.cost(4) == pytest.approx(1 + 1.5 * 3 / 7)  # from size 8
    for _ in range(RETRY):
        costs.observe(1, 2.0)
    assert costs.largest == 4


def test_starting_over_forgets_the_text_and_keeps_the_costs() -> None:
    now = [0.0]
    feeder: Any = SimpleNamespace(cache=SimpleNamespace(layers=[]), model=None)
    speculator = Speculator(feeder, clock=lambda: now[0])
    speculator._costs.observe(1, 2.0)
    speculator.proposed, speculator.accepted, speculator._proposals, speculator._since_single = 5, 4, 3, 2
    speculator._match, speculator._expected, speculator._forward_end = "match", [1], 0.5  # type: ignore[assignment]
    speculator._rates.observe(4, True)
    index = speculator._index
    speculator.start_over()
    assert (speculator.proposed, speculator.accepted, speculator._proposals, speculator._since_single) == (0, 0, 0, 0)
    left: Any = speculator._match, speculator._expected, speculator._forward_end
    assert left == (None, [], None)
    assert speculator._index is not index
    assert speculator._rates.rate(4) == pytest.approx(0.3)
    assert len(speculator._costs._single) == 1


def test_what_was_sampled_is_learned_up_to_the_first_surprise() -> None:
    now = [10.0]
    speculator = Speculator(SimpleNamespace(), clock=lambda: now[0])  # type: ignore[arg-type]
    speculator._match = SimpleNamespace(length=4)  # type: ignore[assignment]
    speculator._expected, speculator._proposals = [7, 8, 9], 2
    speculator.learn([7, 8])
    assert (speculator.proposed, speculator.accepted) == (0, 0)  # no forward yet
    speculator._forward_end = 4.0
    speculator.learn([])
    assert (speculator.proposed, speculator.accepted) == (0, 0)
    speculator.learn([7, 5])
    assert (speculator.proposed, speculator.accepted) == (2, 1)
    assert speculator._costs._rest.value == 3.0
    seen = AcceptanceRates()
    seen.observe(4, True)
    seen.observe(5, False)
    assert [speculator._rates.rate(size) for size in (3, 4, 6)] == [seen.rate(size) for size in (3, 4, 6)]
    speculator.learn([7, 8, 9])  # the third was expected, not proposed
    assert (speculator.proposed, speculator.accepted) == (4, 3)
    speculator.begin_reply()
    speculator.learn([7])
    assert (speculator.proposed, speculator.accepted, speculator._expected) == (4, 3, [])


TEXT = list(range(100, 160))


def speculator_after(text: list[int], at_once: int = 256) -> tuple[Any, Any]:
    """A speculator whose text is `text`, on a machine on which a forward of n tokens takes 1 s and 0.25 s per token."""
    now, log = [0.0], TokenLog()
    log.append(text)
    cache = SimpleNamespace(cache_size=900, length=100, position_limit=900, next_position=100)

    def forward(token: int, proposals: list[int]) -> Any:
        now[0] += 0.75 + 0.25 * (1 + len(proposals))
        return [token, *proposals]

    model = SimpleNamespace(forward=SimpleNamespace(step=SimpleNamespace(max_tokens=at_once)))
    feeder: Any = SimpleNamespace(log=log, cache=cache, model=model, forward_proposals=forward)
    return Speculator(feeder, clock=lambda: now[0]), cache


def test_each_forward_is_timed_and_returns_its_logits_and_proposals() -> None:
    speculator, _ = speculator_after([*TEXT, *TEXT[:20]])
    for _ in range(3):
        assert speculator.forward(TEXT[20], 9, ()) == ([TEXT[20]], [])  # the unit is not known yet
        assert (speculator._since_single, speculator._expected) == (0, [TEXT[21]])
    assert speculator._costs._single.value == 1.0
    for count in (1, 2):
        assert speculator.forward(TEXT[20], 9, ()) == (TEXT[20:24], TEXT[21:24])
        assert (speculator._since_single, speculator._expected) == (count, TEXT[21:24])
    assert speculator._costs.cost(4) == 1.75
    assert len(speculator.forward(TEXT[20], 9, ())[1]) == 5  # up to twice the measured size: 4.2 tokens in 2.25 s
    assert speculator.forward(500, 9, ()) == ([500], [])  # no match
    assert (speculator._since_single, speculator._expected, speculator._proposals) == (0, [], 0)


@pytest.mark.parametrize(
    ("most", "control", "expected"),
    [(9, [], 3), (3, [], 3), (2, [], 2), (1, [], 1), (0, [], 0), (9, [TEXT[23]], 2), (9, [TEXT[21]], 0)],
)
def test_the_limit_and_control_tokens_end_the_proposals(most: int, control: list[int], expected: int) -> None:
    speculator, cache = speculator_after([*TEXT, *TEXT[:20]])
    for _ in range(3):
        speculator._costs.observe(1, 1.0)
    assert speculator.forward(TEXT[20], most, control)[1] == TEXT[21 : 21 + expected]
    assert speculator._proposals == expected
    if not control:
        for limit, used in (("cache_size", "length"), ("position_limit", "next_position")):
            setattr(cache, limit, getattr(cache, used) + 1 + expected)
            assert len(speculator.forward(TEXT[20], 9, ())[1]) == expected
            setattr(cache, limit, 900)


@pytest.mark.parametrize("at_once", [1, 2, 3, 4, 5])
def test_the_model_limits_the_tokens_of_a_forward(at_once: int) -> None:
    speculator, _ = speculator_after([*TEXT, *TEXT[:20]], at_once)
    for _ in range(3):
        speculator._costs.observe(1, 1.0)
    assert len(speculator.forward(TEXT[20], 9, ())[1]) == min(at_once - 1, 3)


def test_one_of_65_forwards_is_of_one_token_and_rare_hits_are_not_proposed() -> None:
    speculator, _ = speculator_after([*TEXT, *TEXT[:20]])
    for _ in range(3):
        speculator._costs.observe(1, 1.0)
    assert SINGLE_EVERY == 64
    sizes = [len(speculator.forward(TEXT[20], 3, ())[1]) for _ in range(66)]
    assert [at for at, size in enumerate(sizes) if size == 0] == [64]
    for _ in range(300):
        speculator._rates.observe(21, False)
    assert speculator.forward(TEXT[20], 9, ())[1] == []
    assert speculator._expected == [TEXT[21]]  # to learn from it
