"""Reads MLPs."""

from __future__ import annotations

from typing import Any

from torch import nn

from streamchat.decode.families.modules import first_of, read_activation
from streamchat.decode.spec import MlpSpec


def read_mlp(mlp: Any) -> MlpSpec:
    """Return the spec of an MLP: gated with two layers or a fused one, or plain.

    Raises:
        UnreadableError: It has a part that a decode step does not compute.
    """
    act = read_activation(first_of(mlp, "act_fn", "activation_fn", "act", "activation"))
    if isinstance(getattr(mlp, "gate_proj", None), nn.Module):
        return MlpSpec((mlp.gate_proj, mlp.up_proj), act, mlp.down_proj)
    if isinstance(getattr(mlp, "gate_up_proj", None), nn.Module):
        return MlpSpec((mlp.gate_up_proj,), act, mlp.down_proj, fused=True)
    up = first_of(mlp, "up_proj", "fc1", "c_fc", "fc_in", "dense_h_to_4h")
    return MlpSpec((up,), act, first_of(mlp, "down_proj", "fc2", "c_proj", "fc_out", "dense_4h_to_h"))
