"""Folders of transformers: after the first start with quantized weights, no native copy is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from streamchat.base import paths
from streamchat.decode.install import is_compiled, tokens_at_once
from streamchat.models import fallback
from streamchat.models.fingerprint import model_fingerprint
from streamchat.models.folder import TILES
from streamchat.models.load import LoadedModel, load_model
from streamchat.models.quantize.weight_storage import stored_bytes
from streamchat.models.read import read_model
from streamchat.quantization.experts import quantized_experts
from streamchat.quantization.linear import QuantizedLinear
from streamchat.quantization.matrix import QuantizedMatrix
from tests.support.families import FAMILIES, build
from tests.support.kernels import needs_kernels
from tests.support.models_help import save, tiny_llama

pytestmark = needs_kernels
SIZES = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 320}


def loaded(folder: Path, weights: str = "int8", **how: Any) -> LoadedModel:
    return load_model(str(folder), device="cpu", weights=weights, **({"dtype": "bfloat16"} | how))


def copies() -> list[Path]:
    return sorted((paths.cache_dir() / "weights").glob("*-served"))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.arange(20)[None], use_cache=False).logits
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_later_starts_read_only_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    folder = save(tiny_llama(**SIZES, tie_word_embeddings=tied), tmp_path / "m")
    first = loaded(folder)
    read: list[Path | None] = []
    plain = read_model

    def spy(plan: Any, progress: Any) -> Any:
        read.append(plan.tiles)
        return plain(plan, progress)

    monkeypatch.setattr(fallback, "read_model", spy)
    later = loaded(folder)
    assert read == copies()
    assert len(read) == 1
    for each in (first, later):
        model: Any = each.model
        assert is_compiled(model)
        assert tokens_at_once(model) == 256
        assert isinstance(model.lm_head, QuantizedLinear)
        assert each.weights == "int8"
        assert isinstance(model.model.layers[1].mlp.up_proj.weight, QuantizedMatrix)
        assert not isinstance(model.model.embed_tokens.weight, QuantizedMatrix)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
        assert model.num_parameters() == tiny_llama(**SIZES, tie_word_embeddings=tied).num_parameters()
        assert stored_bytes(model) + each.quantized_bytes < 2 * model.num_parameters() * (1.2 if tied else 0.8)
    torch.testing.assert_close(logits(first.model), logits(later.model), rtol=0, atol=0)
    assert model_fingerprint(first.model) == model_fingerprint(later.model)
    assert not list((paths.cache_dir() / "weights").glob("*-int8"))  # one copy on disk


def test_the_copy_belongs_to_weights_and_settings(tmp_path: Path) -> None:
    folder = save(tiny_llama(**SIZES), tmp_path / "m")
    native = logits(loaded(folder, "native").model)
    assert not copies()
    loaded(folder)
    assert len(copies()) == 1
    loaded(folder, dtype="float32")
    assert len(copies()) == 2
    assert not isinstance(loaded(folder, "native").model.get_input_embeddings().weight, QuantizedMatrix)
    torch.testing.assert_close(logits(loaded(folder, "native").model), native, rtol=0, atol=0)
    assert loaded(folder, kernels="torch").quantized_bytes > 0  # PyTorch's kernels have their own copy
    save(tiny_llama(seed=1, **SIZES), folder)
    other = logits(loaded(folder).model)
    assert len(copies()) == 3
    expected = logits(loaded(folder, "native").model)
    assert (other - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_copy_is_made_again(tmp_path: Path, harm: str) -> None:
    folder = save(tiny_llama(**SIZES), tmp_path / "m")
    expected = logits(loaded(folder).model)
    [copy] = copies()
    data = bytearray((copy / TILES).read_bytes())
    if harm == "flip":
        data[-3000] ^= 0x55
        (copy / TILES).write_bytes(data)
    elif harm == "cut":
        (copy / TILES).write_bytes(data[:-100])
    else:
        shutil.rmtree(copy)
    torch.testing.assert_close(logits(loaded(folder).model), expected, rtol=0, atol=0)
    assert copies() == [copy]


def test_without_disk_space_the_model_keeps_both_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tiny_llama(**SIZES), tmp_path / "m")

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("streamchat.models.quantize.served_copy.TileWriter", full)
    found = loaded(folder)
    assert (found.weights, found.quantized_bytes > 0) == ("int8", True)
    assert not copies()


@pytest.mark.skipif(not FAMILIES["qwen3_moe"].available, reason="transformers does not have it")
def test_a_mixture_of_experts_keeps_its_quantized_experts(tmp_path: Path) -> None:
    folder = save(build("qwen3_moe"), tmp_path / "m")
    for _ in range(2):
        model: Any = loaded(folder).model
        assert len(quantized_experts(model)) == 3
        assert tokens_at_once(model) == 256
    assert not copies()
