"""Whether a model with learned positions can be prefilled again: what is measured, accepted, and refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3NextConfig

from streamchat.base.errors import UnsupportedModelError
from streamchat.cache.layers.layer import LayerRotation
from streamchat.cache.recompute import fit_recompute
from tests.support.bare_cache import HEADS, WIDTH, bare_config

CPU = torch.device("cpu")


class Learned(nn.Module):
    """A causal LM of two layers whose logits on a filled cache are off, by a share of the spread of those without one.

    It checks that tokens continue the text and have the positions after the cached ones.
    """

    def __init__(self, off: float = 0.0, *, spread: float = 1.0, dtype: Any = torch.float32, fills: int = 2) -> None:
        super().__init__()
        self.config: Any = bare_config(2)
        self.off, self.dtype, self.fills = off, dtype, fills
        self.embeddings = nn.Embedding(300, HEADS * WIDTH)
        generator = torch.Generator().manual_seed(0)
        self.embeddings.weight.data = spread * torch.randn(300, HEADS * WIDTH, generator=generator)
        self.text: list[int] = []
        self.spread = 0.0

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, input_ids: Tensor, past_key_values: Any, use_cache: bool, position_ids: Any = None) -> Any:
        known, ids = past_key_values.get_seq_length(self.fills - 1), input_ids[0].tolist()
        self.text = self.text or ids
        assert ids == self.text[known : known + len(ids)]
        assert position_ids is None if not known else position_ids.tolist() == [list(range(known, known + len(ids)))]
        x = self.embeddings(input_ids)
        states = x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        for layer in range(self.fills):
            past_key_values.update(states, states, layer)
        logits = x @ self.embeddings.weight.T
        self.spread = self.spread or logits.std().item() or 1.0
        return SimpleNamespace(logits=logits + (self.off * self.spread if known else 0.0))


def test_the_fit_of_a_model_that_can_be_prefilled_again() -> None:
    found = fit_recompute(Learned(9e-4), "it has a table of positions")
    assert (found.layers, found.devices) == ((LayerRotation(),) * 2, (CPU,) * 2)
    assert (found.position_limit, found.method, found.rotates) == (2048, "recompute", False)
    assert found.error == pytest.approx(9e-4, rel=0.01)
    windowed = Learned()
    windowed.config = Qwen3Config(
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=64,
        use_sliding_window=True,
        vocab_size=300,
    )
    assert fit_recompute(windowed, "").method == "recompute"


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-3), (torch.bfloat16, 0.2), (torch.float16, 0.2)])
@pytest.mark.parametrize("spread", [1.0, 5.0, 0.0])
def test_logits_in_two_chunks_may_differ_as_far_as_the_dtype_rounds(
    dtype: torch.dtype, allowed: float, spread: float
) -> None:
    assert fit_recompute(Learned(0.95 * allowed, spread=spread, dtype=dtype), "").error < allowed
    for off in (1.1, -1.1, 2.5):
        with pytest.raises(UnsupportedModelError, match=r"a table, and prefill in two chunks .* differ by [\d.]+ of"):
            fit_recompute(Learned(off * allowed, spread=spread, dtype=dtype), "a table")


def test_layers_that_cannot_be_filled_again_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="layer 1 of the model's cache stays empty"):
        fit_recompute(Learned(fills=1), "a table")
    recurrent = Learned()
    recurrent.config = Qwen3NextConfig(
        num_hidden_layers=3, layer_types=["full_attention", "full_attention", "linear_attention"], vocab_size=300
    )
    with pytest.raises(UnsupportedModelError, match="a table, and its recurrent state cannot be rebuilt at each"):
        fit_recompute(recurrent, "a table")
