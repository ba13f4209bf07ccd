"""Mixtures of experts in torch operations, for one token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from streamchat.decode.spec import ACTIVATIONS, ExpertsSpec

Op = Callable[[Tensor], Tensor]


def choose(of: ExpertsSpec, x: Tensor) -> tuple[Tensor, Tensor]:
    """(n, hidden) -> weights and numbers of the chosen experts, (n, top_k) each."""
    shares = torch.softmax(functional.linear(x, of.router), dim=-1, dtype=torch.float32)
    best, chosen = torch.topk(shares, of.top_k, dim=-1)
    if of.is_normalized:
        best = best / best.sum(dim=-1, keepdim=True)
    return best.to(x.dtype), chosen


def compute(of: ExpertsSpec, x: Tensor, shares: Tensor, chosen: Sequence[int]) -> Tensor:
    """(1, hidden) -> (1, hidden): the sum of the `chosen` experts, weighted by `shares`, (top_k)."""
    act, total = ACTIVATIONS[of.act], torch.zeros_like(x)
    for expert, share in zip(chosen, shares, strict=True):
        if of.quantized is None:
            gate, up = functional.linear(x, of.gate_up[expert]).chunk(2, dim=-1)
            out = functional.linear(act(gate) * up, of.down[expert])
        else:
            gate, up = of.quantized.up[expert].multiply(x).chunk(2, dim=-1)
            out = of.quantized.down[expert].multiply(act(gate) * up)
        total = torch.addcmul(total, out, share)
    return total


def experts(of: ExpertsSpec) -> Op:
    """(1, hidden) -> (1, hidden): the weighted sum of the chosen experts; reads the weights of no other."""

    def op(x: Tensor) -> Tensor:
        shares, chosen = choose(of, x)
        return compute(of, x, shares[0], chosen[0].tolist())

    return op


def static_experts(of: ExpertsSpec) -> Op:
    """Return `experts` without reading the choice back from the device; copies the weights of the chosen experts."""
    act = ACTIVATIONS[of.act]

    def op(x: Tensor) -> Tensor:
        shares, chosen = choose(of, x)
        gate, up = (of.gate_up.index_select(0, chosen[0]) @ x.T).squeeze(-1).chunk(2, dim=-1)
        outs = torch.bmm(of.down.index_select(0, chosen[0]), (act(gate) * up)[..., None]).squeeze(-1)
        return shares @ outs

    return op
