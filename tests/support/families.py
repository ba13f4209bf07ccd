"""All tiny families by name, and a builder of seeded models in which a wrong position shows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.support.family_settings import HYBRID, LEARNED, POSITION_FREE, REFUSED, ROTARY, VOCABULARY, Family
from tests.support.tiny import fresh_model

FAMILIES: dict[str, Family] = {f.name: f for f in (*ROTARY, *HYBRID, *POSITION_FREE, *LEARNED, *REFUSED)}
SERVED = [name for name, family in FAMILIES.items() if family.served != "refused" and family.available]
# Parameters of recurrences: they are only stable as their classes initialise them.
SCALE = 1.3
RECURRENT = ("A_log", "dt_bias", "dt_proj", "conv1d", ".D", ".conv.conv.")


def text(count: int, seed: int = 5) -> Tensor:
    """(1, count) token ids."""
    return torch.randint(3, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def build(name: str, attention: str = "sdpa", **changes: Any) -> Any:
    """The tiny model of a family, in float32 and eval mode; the same weights for each `attention`.

    Attention is far from uniform, norms are not the identity, and the logits of a random text have a spread of 1.
    """
    torch.manual_seed(0)
    config = FAMILIES[name].config(**changes)
    model = fresh_model(config, attn_implementation=attention, dtype=torch.float32)
    model.requires_grad_(False)
    _perturb(model)
    spread = model(input_ids=text(30, seed=7), use_cache=False).logits.std()
    head = model.get_output_embeddings()
    for weights in head.parameters():
        weights /= spread
    return model


def _perturb(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, weights in model.named_parameters():
        noise = torch.randn(weights.shape, generator=generator)
        if any(part in name for part in RECURRENT):
            continue
        if weights.dim() < 2:
            weights.add_(0.15 * noise)  # norms and biases
        elif _is_embedding(name):
            weights.copy_(0.5 * noise)
        else:
            weights.copy_(SCALE * noise / weights.shape[-1] ** 0.5)


def _is_embedding(name: str) -> bool:
    return any(part in name for part in ("embed", "wte", "wpe"))
