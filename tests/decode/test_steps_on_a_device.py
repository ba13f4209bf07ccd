"""The static steps of every family on a simulated device: all tensors are on it; the logits are those of the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from streamchat.decode.families import experts
from streamchat.decode.families.registry import model_spec
from streamchat.decode.static import Inputs, bind, static_step
from streamchat.decode.static_prompt import bind_prompt, prompt_step
from tests.support.families import build, text
from tests.support.short_path_families import AVAILABLE
from tests.support.simulated_devices import FarTensor, simulated_devices

SLOTS, LENGTH = 24, 4
# the others have ropes that change with the length
STATIC = [name for name in AVAILABLE if not name.endswith(("_dynamic", "_longrope"))]


def move(model: Any, device: torch.device) -> None:
    """Move the weights; `Module.to` would unwrap the tensors of simulated devices."""
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, weights in table.items():
                if weights is not None:
                    table[name] = moved.setdefault(id(weights), weights.detach().to(device))


def logits_of(model: Any, device: torch.device) -> list[Tensor]:
    """Logits of a prompt step and of the step of one token after it, on `device`."""
    spec, one, several = model_spec(model), static_step(model), prompt_step(model)
    assert spec is not None
    assert one is not None
    shapes = [(1, block.attention.num_kv_heads, SLOTS, block.attention.head_dim) for block in spec.blocks]
    buffers = [(torch.zeros(shape, device=device), torch.zeros(shape, device=device)) for shape in shapes]
    ids, positions, found = text(LENGTH + 1), torch.arange(LENGTH + 1)[None], list[Tensor]()
    if several is not None:
        inputs = Inputs(device, LENGTH)
        inputs.fill(ids[:, :LENGTH], positions[:, :LENGTH], 0, 0)
        found.append(bind_prompt(several, inputs, buffers, torch.float32)())
    inputs = Inputs(device)
    inputs.fill(ids[:, LENGTH:], positions[:, LENGTH:], 0, LENGTH)
    found.append(bind(one, inputs, buffers, torch.float32)())
    return found


@pytest.mark.parametrize("name", STATIC)
@torch.no_grad()
def test_no_tensor_of_a_step_is_elsewhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # reads the choice of the experts back when the model is read, which simulated tensors cannot do
    monkeypatch.setattr(experts, "_closest", lambda spec, module, own: spec)
    model, near = build(name, "eager" if "gemma2" in name else "sdpa"), torch.device("cpu")
    expected = logits_of(model, near)
    with simulated_devices():
        device = torch.device("cpu:1")
        move(model, device)
        found = logits_of(model, device)
    for ours, theirs in zip(found, expected, strict=True):
        assert isinstance(ours, FarTensor)
        torch.testing.assert_close(ours.near, theirs, rtol=0, atol=1e-5)
