"""The next token: right processors in the right order, greedy at 0, repeatable with a seed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from streamchat.chat.sampling import Sampler, new_generator
from streamchat.settings import Settings

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
    assert sampler().window == 0
    draw = sampler(temperature=0.0, repetition_penalty=1.5)
    assert draw.window == 64
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
