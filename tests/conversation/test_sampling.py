"""The next token: right processors in the right order, greedy at 0, repeatable with a seed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from streamchat.config.settings import Settings
from streamchat.conversation.sampling import Sampler, new_generator

CPU = torch.device("cpu")
LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.9])


def sampler(seed: int = 0, **settings: Any) -> Sampler:
    plain = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0}
    return Sampler(Settings(**(plain | settings)), CPU, new_generator(seed, CPU))


def shares(count: int = 4000, recent: tuple[int, ...] = (), **settings: Any) -> dict[int, float]:
    draw = sampler(**settings)
    counts = Counter(draw(LOGITS, recent) for _ in range(count))
    return {token: n / count for token, n in counts.items()}


def test_temperature_0_takes_the_likeliest_and_needs_no_chance() -> None:
    draw = sampler(temperature=0.0)
    state = draw._generator.get_state()
    assert {draw(LOGITS, ()) for _ in range(20)} == {0}
    assert torch.equal(draw._generator.get_state(), state)


def test_shares_are_those_of_the_softmax() -> None:
    expected = LOGITS.softmax(-1)
    for token, share in shares().items():
        assert share == pytest.approx(expected[token].item(), abs=0.03)
    hot = (LOGITS / 0.5).softmax(-1)
    for token, share in shares(temperature=0.5).items():
        assert share == pytest.approx(hot[token].item(), abs=0.03)


@pytest.mark.parametrize(
    ("settings", "possible"),
    [
        ({"top_k": 2}, {0, 4}),
        ({"top_k": 1}, {0}),
        ({"top_p": 0.5}, {0, 4}),
        ({"top_p": 0.01}, {0}),
        ({"min_p": 0.8}, {0, 4}),
        ({"min_p": 1.0}, {0}),
    ],
)
def test_filters_keep_these_tokens(settings: dict[str, Any], possible: set[int]) -> None:
    assert set(shares(400, **settings)) == possible


def test_the_repetition_penalty_sees_the_latest_tokens_only() -> None:
    draw = sampler(temperature=0.0, repetition_penalty=1.5)
    assert draw(LOGITS, ()) == 0
    assert draw(LOGITS, (0,)) == 4
    # a negative logit becomes less likely too
    assert draw(torch.tensor([-1.0, -1.2]), (0,)) == 1


def test_a_seed_repeats_and_minus_1_does_not() -> None:
    def draws(seed: int) -> list[int]:
        draw = sampler(seed)
        return [draw(torch.zeros(1000), ()) for _ in range(8)]

    assert draws(3) == draws(3) != draws(4)
    assert draws(-1) != draws(-1)


def test_half_precision_logits_are_sampled_in_float32() -> None:
    draw = sampler(temperature=0.0, repetition_penalty=1.002)
    # 256 / 1.002 = 255.5, which bfloat16 rounds to 255
    assert draw(torch.tensor([255.0, 256.0], dtype=torch.bfloat16), (1,)) == 1
    assert sampler()(torch.full((4,), -60000.0, dtype=torch.float16), ()) in range(4)


FILTERS: list[dict[str, Any]] = [
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"top_k": 40},
    {"top_k": 1000},
    {"min_p": 0.02},
    {"top_k": 200, "top_p": 0.8},
    {"top_p": 0.95, "min_p": 0.01},
    {"top_k": 300, "top_p": 0.97, "min_p": 0.001, "temperature": 1.7},
    {"temperature": 0.3, "top_p": 0.5},
    {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_what_stays_and_its_shares_are_those_of_transformers(settings: dict[str, Any], spread: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5000, generator=generator) * spread
    recent = [3, 17, 17, 4000]
    expected = reference(logits, recent, settings)

    draw = sampler(**settings)
    seen: list[torch.Tensor] = []

    def first(scores: torch.Tensor) -> int:
        seen.append(scores)
        return 0

    draw._draw = first  # type: ignore[method-assign]  # what it would draw from is compared
    draw(logits.clone(), recent)
    shares = seen[0].double().softmax(-1)
    kept = expected[expected > 0].sort(descending=True).values
    # a running sum of float32 may put one token of 5,000 on the other side of top_p
    assert abs(len(shares) - len(kept)) <= (1 if "top_p" in settings else 0)
    n = min(len(shares), len(kept))
    torch.testing.assert_close(shares[:n], kept[:n], rtol=1e-3, atol=1e-9)


def reference(logits: torch.Tensor, recent: list[int], settings: dict[str, Any]) -> torch.Tensor:
    """Probabilities (vocabulary,) after the processors of transformers."""
    scores, ids = logits[None].double(), torch.tensor([recent])
    for processor in (
        RepetitionPenaltyLogitsProcessor(settings.get("repetition_penalty", 1.0)),
        TemperatureLogitsWarper(settings.get("temperature", 1.0)),
        *([TopKLogitsWarper(settings["top_k"])] if "top_k" in settings else []),
        *([TopPLogitsWarper(settings["top_p"])] if "top_p" in settings else []),
        *([MinPLogitsWarper(settings["min_p"])] if "min_p" in settings else []),
    ):
        scores = processor(ids, scores)
    return scores[0].softmax(-1)


def test_equal_scores_at_the_edge_of_top_k_stay_together() -> None:
    logits = torch.full((1000,), -5.0)
    logits[:7] = torch.tensor([3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    draw = sampler(top_k=3)
    assert {draw(logits, ()) for _ in range(600)} == set(range(6))


def test_each_token_of_a_large_vocabulary_is_drawn_as_often_as_it_should() -> None:
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(2))
    draw = sampler()
    counts = torch.bincount(torch.tensor([draw(logits, ()) for _ in range(20000)]), minlength=3000)
    expected = 20000 * logits.double().softmax(-1)
    # chi-squared with 2,999 degrees of freedom: mean 2,999, deviation 77
    assert ((counts - expected) ** 2 / expected).sum().item() < 2999 + 5 * 77


def test_logits_are_left_as_they_were() -> None:
    logits = LOGITS.clone()
    sampler(temperature=0.5, repetition_penalty=2.0)(logits, (0, 1))
    assert torch.equal(logits, LOGITS)


# --- the draw itself --------------------------------------------------------------------------------------------


def drawn(scores: torch.Tensor, point: float) -> int:
    """The first token at which the summed probabilities exceed `point`, a share of all."""
    shares = scores.double().softmax(-1)
    total, limit = 0.0, point * shares.sum().item()
    for token, share in enumerate(shares.tolist()):
        total += share
        if total > limit:
            return token
    return len(shares) - 1


@pytest.mark.parametrize("temperature", [1.0, 0.4, 2.5])
def test_each_draw_uses_one_number_of_the_generator(temperature: float) -> None:
    numbers = torch.Generator().manual_seed(11)
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3))
    draw, filtered = sampler(11, temperature=temperature), sampler(11, temperature=temperature, top_k=12)
    likely = logits.sort(descending=True, stable=True)
    for _ in range(60):
        point = torch.rand(1, generator=numbers, dtype=torch.float64).item()
        assert draw(logits, ()) == drawn(logits / temperature, point)
        assert filtered(logits, ()) == likely.indices[drawn(likely.values[:12] / temperature, point)]


@pytest.mark.parametrize("count", [63, 64, 65, 511, 512, 513, 900])
@pytest.mark.parametrize("settings", [{"top_p": 0.5}, {"min_p": 0.98}, {"top_p": 0.999}], ids=str)
def test_filters_see_as_many_tokens_as_they_keep(count: int, settings: dict[str, float]) -> None:
    """`count` tokens are about equally likely, and 200 others far less: the draws reach the last one that is kept."""
    logits = torch.full((count + 200,), -30.0)
    likely = torch.randperm(count + 200, generator=torch.Generator().manual_seed(count))[:count]
    logits[likely] = torch.linspace(2.0, 1.99, count)
    shares = logits[likely].double().softmax(-1)
    kept = int((shares.cumsum(-1) - shares < settings.get("top_p", 1.0)).sum())
    generator = new_generator(5, CPU)
    plain: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0}
    draw = Sampler(Settings(**(plain | settings)), CPU, generator)
    for _ in range(12):
        point = torch.rand(1, generator=new_generator(5, CPU).set_state(generator.get_state()), dtype=torch.float64)
        assert draw(logits, ()) == likely[drawn(logits[likely[:kept]], point.item())]
