"""Token ids as a model reads them: on its device and, for measurements, within its vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from streamchat.cache.arguments import parameter_names


def input_device(model: Any) -> torch.device:
    """Return the device on which a causal LM reads token ids: that of its embeddings, if its layers are spread."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def position_ids(model: Any, first: int, count: int) -> Tensor | None:
    """Return the positions `first`, `first` + 1, ..., (1, count); None if the model's forward takes none."""
    if "position_ids" not in parameter_names(model):
        return None
    return torch.arange(first, first + count, device=input_device(model))[None]


def as_input(model: Any, ids: Sequence[int]) -> Tensor:
    """Return `ids` as a batch of one, (1, n), on the device of the model's input."""
    return torch.tensor([list(ids)], device=input_device(model))


def repeated_id(model: Any, shape: tuple[int, int], token: int) -> Tensor:
    """Return `token` repeated in a tensor of this shape; the last id if the vocabulary is smaller."""
    vocabulary: int = model.config.get_text_config().vocab_size
    return torch.full(shape, min(token, vocabulary - 1), device=input_device(model))


def counting_ids(model: Any, count: int, first: int = 0) -> Tensor:
    """Return the ids `first`, `first` + 1, ..., (1, count), modulo the size of the model's vocabulary."""
    ids = torch.arange(first, first + count, device=input_device(model))[None]
    return ids.remainder(model.config.get_text_config().vocab_size)


def random_ids(model: Any, count: int, seed: int) -> Tensor:
    """Return random ids, (1, count), the same for the same `seed`; without the first three, often control tokens."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(min(3, vocabulary - 1), vocabulary, (1, count), generator=generator).to(input_device(model))
