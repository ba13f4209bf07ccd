"""Quantized copies of stacked experts: which are made, what they compute, and how they are replaced and restored."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from streamchat.decode.install import install, is_compiled
from streamchat.kernels.library import load_kernels
from streamchat.models.load import load_model
from streamchat.quantization.experts import QuantizedExperts, quantized_experts
from streamchat.quantization.linear import MAX_ROWS, quantized_bytes
from streamchat.quantization.replace import groups, quantize_group, replace, restore
from streamchat.quantization.weights import Kind
from tests.support.families import FAMILIES, build, text
from tests.support.models_help import save

MIXTURES = [name for name in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe") if FAMILIES[name].available]


def quantized(name: str, kind: Kind, kernels: str = "auto") -> Any:
    model, compiled = build(name), load_kernels(kernels)
    replace(model, {group: quantize_group(model, group, its, compiled) for group, its in groups(model, kind).items()})
    return model


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize(("kind", "allowed"), [("int8", 0.02), ("int4", 0.2)])
@pytest.mark.parametrize("name", MIXTURES)
def test_quantized_experts_are_near_the_original_ones(name: str, kind: Kind, allowed: float, kernels: str) -> None:
    model = quantized(name, kind, kernels)
    found = quantized_experts(model)
    assert len(found) == 3
    for experts in found.values():
        assert {whole.kind for whole in experts.wholes} == {kind}
        hidden: int = experts.plain.down_proj.shape[1]
        x = torch.randn(MAX_ROWS, hidden, generator=torch.Generator().manual_seed(3))
        chosen, shares = torch.tensor([[0, 1], [2, 3], [3, 0], [0, 2]]), torch.tensor([0.75, 0.25]).expand(4, 2)
        expected = experts.plain(x, chosen, shares)
        error = (experts(x, chosen, shares) - expected).norm() / expected.norm()
        assert 0 < error < allowed
        many = [each.repeat(2, 1) for each in (x, chosen, shares)]
        torch.testing.assert_close(experts(*many), experts.plain(*many))


def test_experts_are_counted_and_restored() -> None:
    model = quantized("mixtral", "int8")
    before = quantized_bytes(model)
    experts = sum(weight.nbytes for each in quantized_experts(model).values() for weight in each.wholes)
    assert before > experts > sum(each.numel() for each in experts_of(model).parameters()) * 3
    restore(model)
    assert not quantized_experts(model)
    assert quantized_bytes(model) == 0
    torch.testing.assert_close(model(text(9)).logits, build("mixtral")(text(9)).logits)


def experts_of(model: Any) -> Any:
    return model.model.layers[0].mlp.experts


def test_experts_that_compute_something_else_stay() -> None:
    model = build("mixtral")
    plain = experts_of(model).forward
    experts_of(model).forward = lambda *given: 2 * plain(*given)
    names = {name for group in groups(model, "int8") for name in group}
    assert "model.layers.0.mlp.experts.down_proj" not in names
    assert "model.layers.1.mlp.experts.down_proj" in names


def test_a_router_and_the_gate_of_a_shared_expert_stay_native() -> None:
    names = {name for group in groups(build("qwen2_moe"), "int8") for name in group}
    assert "model.layers.0.mlp.shared_expert.up_proj" in names
    assert not any("gate" in name.split(".") or name.endswith("expert_gate") for name in names)


def test_a_loaded_mixture_decodes_with_quantized_experts_and_again_from_its_saved_copy(tmp_path: Path) -> None:
    save(build("mixtral"), tmp_path / "model")
    compiled, logits = load_kernels("auto") is not None, []
    for _ in range(2):
        loaded = load_model(str(tmp_path / "model"), device="cpu", weights="int8")
        model: Any = loaded.model
        assert isinstance(experts_of(model), QuantizedExperts)
        assert is_compiled(model) == compiled
        with torch.inference_mode():
            logits.append(model(text(3)).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0)


def test_a_copy_of_a_quantized_mixture_has_its_own_weights() -> None:
    model = quantized("mixtral", "int8")
    copied = copy.deepcopy(model)
    copied.model.layers[0].mlp.experts.wholes[0].data.zero_()
    assert copied.model.layers[0].mlp.experts.up[0].data.count_nonzero() == 0
    assert experts_of(model).wholes[0].data.count_nonzero() > 0
    assert install(model, load_kernels("auto"))
