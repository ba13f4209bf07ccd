"""Models that are read without `from_pretrained` are those that it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from streamchat.models.light.skeleton import read_exactly
from tests.support.families import FAMILIES, build, text

OFTEN = ("llama", "gpt2", "gpt_neox", "gemma3_window_16", "qwen2", "phi3")
"""Read in every run of the tests; the others with the slow ones."""


def read(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model that is read exactly, or None."""
    config: Any = AutoConfig
    files = sorted(folder.glob("*.safetensors"))
    return read_exactly(folder, files, config.from_pretrained(folder), dtype, "sdpa")


def usual(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model that transformers reads."""
    library: Any = AutoModelForCausalLM
    return library.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")


def assert_same(one: Any, other: Any) -> None:
    """Same weights, buffers, ties and configurations."""
    for kind in ("named_parameters", "named_buffers"):
        mine, theirs = dict(getattr(one, kind)()), dict(getattr(other, kind)())
        assert list(mine) == list(theirs)
        for name, tensor in mine.items():
            assert tensor.dtype == theirs[name].dtype, name
            assert torch.equal(tensor, theirs[name]), name
    assert one.config.to_dict() == other.config.to_dict()
    assert one.generation_config.to_dict() == other.generation_config.to_dict()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow)
        for name, family in FAMILIES.items()
        if family.available and family.sdpa and family.served != "refused"
    ],
)
def test_a_model_is_the_one_that_transformers_reads(tmp_path: Path, name: str) -> None:
    build(name).save_pretrained(tmp_path)
    mine = read(tmp_path)
    if mine is None:
        assert name not in OFTEN
        pytest.skip("from_pretrained reads it")
    theirs = usual(tmp_path)
    assert_same(mine, theirs)
    ids = text(12)
    with torch.inference_mode():
        assert torch.equal(mine.eval()(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_another_dtype_and_tied_weights(tmp_path: Path, tied: bool) -> None:
    build("llama", tie_word_embeddings=tied).save_pretrained(tmp_path)
    mine = read(tmp_path, torch.bfloat16)
    assert (mine.lm_head.weight is mine.model.embed_tokens.weight) is tied
    assert_same(mine, usual(tmp_path, torch.bfloat16))


def test_several_files(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(read(tmp_path), usual(tmp_path))


@pytest.mark.parametrize("fault", ["missing", "shape", "unknown", "adapter", "damaged", "quantized"])
def test_only_a_model_with_exactly_its_weights_is_read(tmp_path: Path, fault: str) -> None:
    """The message for the others comes from `from_pretrained`, or from the check of what it reports."""
    build("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    match fault:
        case "missing":
            del tensors[name]
        case "shape":
            tensors[name] = tensors[name][:-1]
        case "unknown":
            tensors["model.more.weight"] = torch.zeros(2)
        case "adapter":
            (tmp_path / "adapter_config.json").write_text("{}")
        case "quantized":
            config = tmp_path / "config.json"
            config.write_text(config.read_text().replace("{", '{"quantization_config": {"quant_method": "fp8"},', 1))
    if fault == "damaged":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        save_file(tensors, file, {"format": "pt"})
    assert read(tmp_path) is None


def test_a_model_without_such_attention_is_left_to_transformers(tmp_path: Path) -> None:
    build("gptj").save_pretrained(tmp_path)
    config: Any = AutoConfig
    found = config.from_pretrained(tmp_path)
    files = [tmp_path / "model.safetensors"]
    assert read_exactly(tmp_path, files, found, torch.float32, "no such attention") is None
