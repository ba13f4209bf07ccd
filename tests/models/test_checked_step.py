"""A short path that gives other logits than the model's own forward is not used, and the user is told."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace as changed
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamchat.cache.positions.strategy import choose_fit
from streamchat.decode import install as short
from streamchat.decode.check import check_step
from streamchat.decode.families.blocks import AROUND, Family, read_blocks
from streamchat.decode.families.parts import Place
from streamchat.decode.families.registry import READERS, model_spec
from streamchat.decode.spec import ModelSpec
from streamchat.kernels.library import load_kernels
from streamchat.models import checked_step
from streamchat.models.checked_step import install_checked
from streamchat.models.fingerprint import set_contents_digest
from streamchat.quantization.replace import groups, quantize_group, replace
from tests.support.decode_models import KNOWN
from tests.support.decode_models import make as make_known
from tests.support.families import FAMILIES, build


@pytest.fixture(params=["auto", "torch"])
def kernels(request: pytest.FixtureRequest) -> Any:
    return load_kernels(request.param)


def has_short_path(model: Any) -> bool:
    return "forward" in model.__dict__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KNOWN)
def test_a_right_step_is_used(name: str, dtype: torch.dtype, kernels: Any) -> None:
    model = make_known(name).to(dtype)
    set_contents_digest(model, f"{name} {dtype}")
    assert install_checked(model, kernels, "native") == ()
    assert has_short_path(model)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
def test_a_right_step_of_quantized_weights_is_used(name: str, kind: Any, kernels: Any) -> None:
    model = make_known(name)
    set_contents_digest(model, f"{name} {kind}")
    replace(model, {group: quantize_group(model, group, its, kernels) for group, its in groups(model, kind).items()})
    assert install_checked(model, kernels, kind) == ()
    assert has_short_path(model)


MIXTURES = [name for name in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe") if FAMILIES[name].available]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MIXTURES)
def test_a_right_step_of_a_mixture_of_experts_is_used(name: str, dtype: torch.dtype, kernels: Any) -> None:
    model = build(name).to(dtype)
    choose_fit(model)  # its check is not confused by other experts either
    set_contents_digest(model, f"{name} {dtype}")
    assert install_checked(model, kernels, "native") == ()
    assert has_short_path(model)


def with_experts(spec: ModelSpec, **members: Any) -> ModelSpec:
    """The same model with these members in all mixtures of experts."""
    blocks = (changed(block, mlp=changed(block.mlp, **members)) for block in spec.blocks)
    return changed(spec, blocks=tuple(blocks))


def with_attention(spec: ModelSpec, **members: Any) -> ModelSpec:
    """The same model with these members in all attentions."""
    blocks = (changed(block, attention=changed(block.attention, **members)) for block in spec.blocks)
    return changed(spec, blocks=tuple(blocks))


WRONG: dict[str, tuple[str, Callable[[ModelSpec], ModelSpec]]] = {
    "weights of experts": ("qwen3_moe", lambda spec: with_experts(spec, is_normalized=True)),
    "number of experts": ("mixtral", lambda spec: with_experts(spec, top_k=1)),
    "no shared expert": ("qwen2_moe", lambda spec: with_experts(spec, shared=None, shared_gate=None)),
    "scale": ("llama", lambda spec: with_attention(spec, scale=1.3 * spec.blocks[0].attention.scale)),
    "halves instead of pairs": ("glm", lambda spec: with_attention(spec, interleaved=False)),
    "soft cap of the logits": ("gemma2_window_64", lambda spec: changed(spec, logit_softcap=1.0)),
    "window": ("mistral_window_16", lambda spec: with_attention(spec, window=4)),
    "one block less": ("granite", lambda spec: changed(spec, blocks=(*spec.blocks[:-1], spec.blocks[0]))),
    "scale of the logits": ("cohere", lambda spec: changed(spec, logit_scale=2 * spec.logit_scale)),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_step_is_not_used(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = load_kernels("auto")
    if kernels is None:
        pytest.skip("needs compiled kernels")
    family, wrong = WRONG[what]
    model = build(family, "eager" if family.startswith("gemma2") else "sdpa")
    set_contents_digest(model, what)
    right = model_spec(model)
    assert right is not None
    monkeypatch.setattr(short, "model_spec", lambda model: wrong(right))
    [note] = install_checked(model, kernels, "native")
    assert note.startswith("The short path for this model gives other logits than transformers' forward (off by ")
    assert not has_short_path(model)
    monkeypatch.setattr(short, "model_spec", lambda model: right)
    assert install_checked(model, kernels, "native") == ()
    assert has_short_path(model)


@pytest.mark.parametrize("family", ["mistral_window_64", "gemma3_window_64", "gemma2_window_64", "phi3_windowed"])
def test_a_window_longer_than_the_text_of_the_check_is_seen(
    family: str, kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"sliding_window": 2047} if family == "phi3_windowed" else {}
    name = family.removesuffix("_windowed")
    model = build(name, FAMILIES[name].attentions[0], **changes)
    set_contents_digest(model, family)
    monkeypatch.setattr(Place, "window", None)
    [note] = install_checked(model, kernels, "native")
    assert "gives other logits" in note
    monkeypatch.undo()
    assert install_checked(model, kernels, "native") == ()
    assert has_short_path(model)
    assert changes.get("sliding_window", 64) == model.config.get_text_config().sliding_window


@pytest.mark.parametrize("member", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_soft_caps_far_above_the_logits_are_seen(member: str, kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gemma2_window_64", "eager", attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
    set_contents_digest(model, member)
    right = read_blocks

    def forgetful(model: Any, **given: Any) -> ModelSpec:
        spec = right(model, **given)
        wrong = {"softcap": None} if member.startswith("attn") else {}
        return changed(with_attention(spec, **wrong), logit_softcap=spec.logit_softcap if wrong else None)

    monkeypatch.setitem(
        READERS, "Gemma2ForCausalLM", functools.partial(forgetful, family=Family(AROUND, softcaps=True))
    )
    [note] = install_checked(model, kernels, "native")
    assert "gives other logits" in note
    monkeypatch.undo()
    assert install_checked(model, kernels, "native") == ()
    assert has_short_path(model)
    assert (model.config.attn_logit_softcapping, model.config.final_logit_softcapping) == (50.0, 30.0)


def test_a_step_that_raises_is_not_used(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_known("llama")
    set_contents_digest(model, "raises")
    right = model_spec(model)
    assert right is not None

    def broken(*args: Any) -> Any:
        raise RuntimeError("no angles")

    monkeypatch.setattr(short, "model_spec", lambda model: changed(right, rotaries=(broken,)))
    [note] = install_checked(model, kernels, "native")
    assert note == (
        "The short path for this model fails (RuntimeError: no angles), so transformers' forward is used, "
        "which is slower."
    )
    assert not has_short_path(model)


def test_a_step_that_cannot_be_built_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_known("llama")

    def broken(model: Any) -> Any:
        raise RuntimeError("no layers")

    monkeypatch.setattr(short, "model_spec", broken)
    [note] = install_checked(model, None, "native")
    assert note.startswith("The short path for this model fails (RuntimeError: no layers), so")
    assert not has_short_path(model)


def test_an_adapter_around_any_layer_is_computed() -> None:
    class Adapter(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.layer(x)
            return result + 1

    model = make_known("llama")
    block = model.model.layers[1]
    block.self_attn.o_proj = Adapter(block.self_attn.o_proj)
    block.mlp.down_proj = Adapter(block.mlp.down_proj)
    set_contents_digest(model, "adapters")
    assert install_checked(model, load_kernels("auto"), "native") == ()
    assert has_short_path(model)


def test_logits_that_are_not_finite_verify_nothing() -> None:
    model = make_known("llama").to(torch.bfloat16)
    model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    set_contents_digest(model, "not a number")
    [note] = install_checked(model, None, "native")
    assert "other logits than transformers' forward (off by inf of" in note
    assert not has_short_path(model)


def test_the_verdict_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[Any] = []
    check = check_step

    def noted(model: Any) -> Any:
        checks.append(model)
        return check(model)

    monkeypatch.setattr(checked_step, "check_step", noted)
    for weights, expected in (("native", 1), ("native", 1), ("int8", 2)):
        model = make_known("llama")
        set_contents_digest(model, "remembered")
        assert install_checked(model, None, weights) == ()
        assert len(checks) == expected
    monkeypatch.setattr(checked_step, "code_digest", lambda package: "other code")
    assert install_checked(make_known("llama"), None, "native") == ()
    assert len(checks) == 3
