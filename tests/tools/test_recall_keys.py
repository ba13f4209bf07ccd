"""`tools.recall_keys`: ranks by mean keys, on a tiny model."""

from __future__ import annotations

from itertools import repeat
from typing import Any

import pytest
import torch

from tests.support.models_help import tiny_llama
from tests.support.toy_tokenizer import CHATML, VOCABULARY, toy_tokenizer
from tools.recall_keys import Keys, measure, ranks


def test_the_best_passage_of_a_turn_counts() -> None:
    assert ranks(torch.tensor([0.1, 0.9, 0.5, 0.2]), [1, 1, 2, 3], 2) == 2
    assert ranks(torch.tensor([0.1, 0.9, 0.5, 0.2]), [1, 1, 2, 3], 1) == 1


def test_keys_are_those_before_the_rotation() -> None:
    model: Any = tiny_llama()
    found = Keys(model, 1).of([5, 6, 7])
    layer = model.model.layers[0]
    plain = layer.self_attn.k_proj(layer.input_layernorm(model.model.embed_tokens(torch.tensor([[5, 6, 7]]))))
    torch.testing.assert_close(found[0], plain[0])


@pytest.mark.slow
def test_all_questions_get_a_rank() -> None:
    model = tiny_llama(vocab_size=VOCABULARY, max_position_embeddings=4096)
    result = measure(model, toy_tokenizer(CHATML), repeat(("so it is", "yes")), 2)
    assert {kind: tuple(found.shape) for kind, found in result.items()} == {"direct": (40, 3), "paraphrased": (40, 3)}
    assert all(1 <= int(found.min()) <= int(found.max()) <= 440 for found in result.values())
