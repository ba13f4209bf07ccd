"""A model whose weights are only codes is used as any other model of transformers."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM

from streamchat.models.load import load_model
from streamchat.quantization.matrix import QuantizedMatrix
from tests.support.gguf_models import FAMILIES, write_family
from tests.support.kernels import needs_kernels

pytestmark = needs_kernels
IDS = torch.arange(12)[None]


def loaded(folder: Path, family: str = "llama", kind: Type = Type.Q4_1, **how: Any) -> Any:
    path = folder / "a.gguf"
    if not path.exists():
        write_family(path, FAMILIES[family], lambda name: kind)
    return load_model(str(path), device="cpu", **({"dtype": "bfloat16", "weights": "auto"} | how)).model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits.float()
    return found


def a_matrix(model: Any) -> QuantizedMatrix:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, QuantizedMatrix)
    return weight


@pytest.mark.parametrize("family", ["llama", "llama untied", "gpt2"])
def test_it_is_saved_with_plain_weights(tmp_path: Path, family: str) -> None:
    model = loaded(tmp_path, family)
    model.save_pretrained(tmp_path / "saved")
    library: Any = AutoModelForCausalLM
    again = library.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16).eval()
    torch.testing.assert_close(again.get_input_embeddings().weight, a_matrix(model).whole(), rtol=0, atol=0)
    native = loaded(tmp_path, family, weights="native")
    torch.testing.assert_close(logits(again), logits(native), rtol=0.02, atol=0.02)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in native.state_dict().items()
    }
    assert {type(tensor) for tensor in state.values()} == {torch.Tensor}
    assert type(pickle.loads(pickle.dumps(a_matrix(model)))) is torch.nn.Parameter


@pytest.mark.parametrize("weights", ["auto", "native"])
def test_the_whole_model_can_be_pickled(tmp_path: Path, weights: str) -> None:
    model = loaded(tmp_path, weights=weights)
    again = pickle.loads(pickle.dumps(model))
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert {type(weight) for weight in again.parameters()} == {torch.nn.Parameter}
    assert (logits(again) - logits(model)).norm() < 0.05 * logits(model).norm()


def test_codes_cannot_be_changed_without_notice(tmp_path: Path) -> None:
    model = loaded(tmp_path)
    weight, before = a_matrix(model), a_matrix(model).whole()
    changes: list[Any] = [
        lambda: weight.add_(1),
        lambda: weight.data.mul_(2),
        lambda: weight.__setitem__(0, 1),
        lambda: weight.copy_(torch.zeros(weight.shape)),
        lambda: torch.add(weight, 1, out=weight),
        lambda: torch.nn.init.zeros_(weight),
    ]
    for change in changes:
        with torch.no_grad(), pytest.raises(TypeError, match="weights='native'"):
            change()
    with pytest.raises(RuntimeError, match="cannot be changed"):
        model.load_state_dict(model.state_dict())
    torch.testing.assert_close(weight.whole(), before, rtol=0, atol=0)


def test_gradients_of_inputs_pass_through_codes(tmp_path: Path) -> None:
    model, native = loaded(tmp_path), loaded(tmp_path, weights="native")
    found = []
    for each in (model, native):
        x = each.get_input_embeddings()(IDS).detach().requires_grad_(True)
        each(inputs_embeds=x, use_cache=False).logits.float().square().mean().backward()
        assert x.grad is not None
        found.append(x.grad.float())
    assert (found[0] - found[1]).norm() < 0.05 * found[1].norm()


def test_wrong_operands_are_refused_as_by_plain_weights(tmp_path: Path) -> None:
    weight = a_matrix(loaded(tmp_path))
    with pytest.raises(ValueError, match="inputs of 5 columns"):
        torch.nn.functional.linear(torch.ones(2, 5, dtype=torch.bfloat16), weight)
    with pytest.raises(RuntimeError, match="indices"):
        torch.nn.functional.embedding(torch.tensor([1.0]), weight)
    with pytest.raises(IndexError):
        torch.nn.functional.embedding(torch.tensor([weight.shape[0]]), weight)


def test_it_can_be_shared_with_other_processes(tmp_path: Path) -> None:
    model = loaded(tmp_path)
    before = logits(model)
    model.share_memory()
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "how", [{}, {"weights": "native"}, {"weights": "int8"}, {"kernels": "torch"}, {"dtype": "float16"}]
)
def test_it_can_be_loaded_and_copied_in_inference_mode(tmp_path: Path, how: dict[str, Any]) -> None:
    with torch.inference_mode():
        model = loaded(tmp_path, **how)
        twin = copy.deepcopy(model)
        expected = logits(model)
        a = model.get_input_embeddings().weight
        torch.testing.assert_close(a.to(torch.float64)[:3], a[:3].to(torch.float64), rtol=0.01, atol=0)
    assert not any(weight.is_inference() for weight in model.parameters())
    for each in (model, twin):  # usable outside, too
        torch.testing.assert_close(logits(each), expected, rtol=0, atol=0)
    model.get_input_embeddings().weight.requires_grad_(True)
    assert model(input_ids=IDS, use_cache=False).logits.isfinite().all()
