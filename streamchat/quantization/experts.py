"""Mixtures of experts that use quantized weights for a few tokens, and the original weights for many."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from streamchat.quantization.weights import QuantizedWeight

STACKED = ("gate_up_proj", "down_proj")
"""Parameters of a module of experts: (experts, rows, columns) each."""


class QuantizedExperts(nn.Module):
    """Replaces a module of experts; keeps its parameters for long inputs.

    Args:
        plain: The original module.
        up: Its `gate_up_proj`, as one matrix of the rows of all experts.
        down: Its `down_proj`, likewise.
        max_rows: Maximum number of tokens for which the quantized weights are used.
    """

    plain: Any
    """The original module."""

    def __init__(self, plain: Any, up: QuantizedWeight, down: QuantizedWeight, max_rows: int) -> None:
        super().__init__()
        self.__dict__.update(plain.__dict__)
        self.__dict__["plain"] = plain  # not a child: the parameters are registered on self
        self.max_rows = max_rows
        self.wholes = up, down
        count = plain.gate_up_proj.shape[0]
        self.up, self.down = _split(up, count), _split(down, count)
        """The matrices of each expert."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(n, hidden), (n, top_k) numbers and weights of the chosen experts -> (n, hidden)."""
        if not 0 < len(hidden_states) <= self.max_rows or hidden_states.device.type != "cpu":
            result: Tensor = self.plain(hidden_states, top_k_index, top_k_weights)
            return result
        total = torch.zeros_like(hidden_states)
        for expert in sorted(set(top_k_index.flatten().tolist())):
            rows, places = torch.where(top_k_index == expert)
            gate, up = self.up[expert].multiply(hidden_states[rows]).chunk(2, dim=-1)
            act: Any = self.act_fn
            out = self.down[expert].multiply(act(gate) * up)
            total.index_add_(0, rows, (out * top_k_weights[rows, places, None]).to(total.dtype))
        return total


def _split(whole: QuantizedWeight, count: int) -> list[QuantizedWeight]:
    """Return the matrices of the experts, as views if the kernels accept them."""
    rows = whole.rows // count
    return [whole.part(expert * rows, (expert + 1) * rows) for expert in range(count)]


@torch.no_grad()
def is_experts(module: nn.Module) -> bool:
    """Return whether `module` is a plain module of gated experts without biases, whose parameters are stacked.

    The first half of the rows of an expert's `gate_up_proj` is its gate. Modules with such parameters may use them
    differently, so the first expert is tried.
    """
    parameters = dict(module.named_parameters(recurse=False))
    if set(parameters) != set(STACKED) or any(each.dim() != 3 for each in parameters.values()):
        return False
    gate_up, down = (parameters[name] for name in STACKED)
    if gate_up.shape[0] != down.shape[0] or gate_up.shape[1:] != (2 * down.shape[2], down.shape[1]):
        return False
    act: Any = getattr(module, "act_fn", None)
    if act is None or isinstance(module, QuantizedExperts):
        return False
    x = torch.randn(1, down.shape[1], generator=torch.Generator().manual_seed(0)).to(down)
    try:
        found = module(x, torch.zeros(1, 1, dtype=torch.long, device=x.device), torch.ones(1, 1).to(x))
    except TypeError:  # other arguments
        return False
    gate, up = nn.functional.linear(x, gate_up[0]).chunk(2, dim=-1)
    expected = nn.functional.linear(act(gate) * up, down[0])
    return bool((found - expected).norm() <= 0.05 * expected.norm())


def quantized_experts(model: nn.Module) -> dict[str, QuantizedExperts]:
    """Return the quantized modules of experts of `model` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedExperts)}
