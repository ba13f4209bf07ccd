"""Token ids for measurements: on the device and within the vocabulary of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from streamchat.cache.positions.fit import fit_positions
from streamchat.cache.token_ids import as_input, counting_ids, input_device, position_ids, random_ids, repeated_id
from tests.support.models_help import tiny_llama
from tests.support.tiny import fresh_model

VOCABULARY = tiny_llama().config.vocab_size


class WithoutPositions(nn.Module):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids


def test_the_device_is_that_of_the_embeddings_if_the_layers_are_elsewhere() -> None:
    model: Any = tiny_llama()
    model.model.embed_tokens.to("meta")
    assert {weight.device.type for weight in model.parameters()} == {"meta", "cpu"}
    assert input_device(model) == as_input(model, (1, 2)).device == torch.device("meta")


def test_ids_are_a_batch_of_one() -> None:
    assert as_input(tiny_llama(), (3, 4, 5)).tolist() == [[3, 4, 5]]


def test_counting_ids_stay_in_the_vocabulary() -> None:
    ids = counting_ids(tiny_llama(), 4, VOCABULARY - 2)
    assert ids.tolist() == [[VOCABULARY - 2, VOCABULARY - 1, 0, 1]]


def test_random_ids_are_the_same_for_the_same_seed() -> None:
    ids = random_ids(tiny_llama(), 2000, seed=3)
    assert ids.shape == (1, 2000)
    assert (int(ids.min()), int(ids.max())) == (3, VOCABULARY - 1)
    assert torch.equal(ids, random_ids(tiny_llama(), 2000, seed=3))
    assert not torch.equal(ids, random_ids(tiny_llama(), 2000, seed=4))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_random_ids_of_a_tiny_vocabulary(size: int) -> None:
    model: Any = tiny_llama()
    model.config.vocab_size = size
    assert set(random_ids(model, 50, seed=0)[0].tolist()) == {size - 1}


@pytest.mark.parametrize("size", [2, 5, 7])
def test_the_positions_of_a_model_with_a_tiny_vocabulary_are_measured(size: int) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    ids: dict[str, Any] = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}
    model = fresh_model(LlamaConfig(vocab_size=size, **sizes, **ids))
    assert set(repeated_id(model, (1, 3), 7)[0].tolist()) == {size - 1}
    assert fit_positions(model).method == "rotation"


def test_positions_only_for_a_model_that_takes_them() -> None:
    positions = position_ids(tiny_llama(), 7, 3)
    assert positions is not None
    assert positions.tolist() == [[7, 8, 9]]
    assert position_ids(WithoutPositions(), 7, 3) is None
