"""`python -m tools.random_gguf`: the weights have the expected spread, and the file loads as any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from streamchat.models.load import load_model
from streamchat.quantization.replace import groups
from tests.support.models_help import write_gguf
from tools import random_gguf
from tools.random_gguf import BLOCKS, DEVIATION, TYPES, Shape, write

EXPECTED = {"Q4_0": {"int4"}, "Q4_1": {"int4"}, "Q4_K_M": {"int4", "int8"}, "Q8_0": {"int8"}}
"""What `auto` quantizes the layers to."""
SHAPE = Shape(hidden=256, layers=3, heads=4, kv_heads=2, inner=512)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tokenizer.gguf")


@pytest.mark.parametrize("type_", BLOCKS, ids=lambda type_: str(type_.name))
def test_random_blocks_are_weights_around_0(type_: Any) -> None:
    weights = gguf.dequantize(BLOCKS[type_](np.random.default_rng(0), 2000), type_)
    assert weights.std() == pytest.approx(DEVIATION, rel=0.01)
    assert abs(weights.mean()) < DEVIATION / 8  # Q4_0 has one more code below 0 than above
    assert len(np.unique(weights)) >= 16


@pytest.mark.parametrize("kind", TYPES)
def test_the_file_loads(kind: str, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMCHAT_HOME", str(tmp_path / "home"))
    path = tmp_path / "random.gguf"
    write(path, SHAPE, kind, tokenizer, name="small")
    loaded = load_model(str(path), device="cpu", dtype="float32", weights="native")
    config = loaded.model.config
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (256, 3, 512)
    assert (config.num_attention_heads, config.num_key_value_heads, config.tie_word_embeddings) == (4, 2, True)
    assert loaded.tokenizer("hel")["input_ids"] == load_model(str(tokenizer)).tokenizer("hel")["input_ids"]
    kinds = {its for group, its in groups(loaded.model, "auto").items() if group != ("lm_head",)}
    assert kinds == EXPECTED[kind]
    weights = loaded.model.model.layers[2].mlp.down_proj.weight
    assert float(weights.std()) == pytest.approx(DEVIATION, rel=0.02)


def test_some_layers_of_q4_k_m_have_more_bits(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "random.gguf"
    write(path, Shape(256, 24, 4, 4, 256), "Q4_K_M", tokenizer, name="deep")
    found = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert found["token_embd.weight"] == "Q6_K"
    assert {found[f"blk.{number}.attn_q.weight"] for number in range(24)} == {"Q4_K"}
    finer = [number for number in range(24) if found[f"blk.{number}.ffn_down.weight"] == "Q6_K"]
    assert finer == [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]


def test_the_command(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(random_gguf.SHAPES, "smollm2-135m", SHAPE)
    path = tmp_path / "random.gguf"
    arguments = ["--shape", "smollm2-135m", "--out", str(path), "--tokenizer", str(tokenizer)]
    assert random_gguf.main(arguments) == 0
    assert capsys.readouterr().out == f"{path}: {path.stat().st_size / 1e6:,.1f} MB\n"
    first = path.read_bytes()
    assert random_gguf.main(arguments) == 0
    assert path.read_bytes() == first  # the same weights each time


def test_sizes_that_blocks_do_not_fit_are_refused(tmp_path: Path, tokenizer: Path, capsys: Any) -> None:
    arguments = ["--shape", "smollm2-135m", "--type", "Q4_K_M", "--tokenizer", str(tokenizer)]
    with pytest.raises(SystemExit):
        random_gguf.main([*arguments, "--out", str(tmp_path / "random.gguf")])
    assert capsys.readouterr().err.endswith("576 columns are not a multiple of 256, the block of Q6_K\n")
    assert not (tmp_path / "random.gguf").exists()
