"""The real bundled model: what its tokenizer and its weights must do."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from streamchat.models.load import LoadedModel, load_model

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def loaded(default_model_dir: Path) -> LoadedModel:
    return load_model(str(default_model_dir), device="cpu", dtype="float32")


def test_answers_paris(loaded: LoadedModel) -> None:
    ids: Any = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    model: Any = loaded.model
    reply = model.generate(**ids, do_sample=False, max_new_tokens=20)[0, ids["input_ids"].shape[1] :]
    assert loaded.tokenizer.decode(reply) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.parametrize(
    "text",
    [
        "a\n\n\nb  two   three    four\t\ttabs \n trailing ",
        "family 👨‍👩‍👧‍👦 flag 🇫🇷 Привет 안녕하세요 שלום ½ ٣",
        "def f(x):\n    if x > 10:\n        return x[1:-1] , 'don't' ; # 3.14159\n",
        "<|im_start|>user\nhi<|im_end|>\n",
        " ",
        "",
    ],
)
def test_text_survives_the_tokenizer(loaded: LoadedModel, text: str) -> None:
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(text)) == text


def test_tokenizer_is_that_of_smollm2(loaded: LoadedModel) -> None:
    tokenizer = loaded.tokenizer
    assert [tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [0, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert len(tokenizer) == loaded.model.config.vocab_size == 49_152
    assert tokenizer.encode("Hello") == tokenizer.encode("Hello", add_special_tokens=False)
    # digits are cut first, so the spaces and line breaks before them stay together
    assert tokenizer.tokenize("x  12\n\n34") == ["x", "ĠĠ", "1", "2", "ĊĊ", "3", "4"]
    assert tokenizer.clean_up_tokenization_spaces is False


def test_chat_template_is_that_of_the_file(loaded: LoadedModel) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = loaded.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_converted_weights_are_those_of_the_gguf_file(loaded: LoadedModel, default_model_dir: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(str(next(default_model_dir.glob("*.gguf"))))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    weights = loaded.model.state_dict()
    for ours, theirs in {
        "model.embed_tokens.weight": "token_embd.weight",
        "lm_head.weight": "token_embd.weight",
        "model.layers.29.mlp.down_proj.weight": "blk.29.ffn_down.weight",
        "model.layers.7.self_attn.v_proj.weight": "blk.7.attn_v.weight",
        "model.norm.weight": "output_norm.weight",
    }.items():
        original = torch.from_numpy(gguf.dequantize(tensors[theirs].data, tensors[theirs].tensor_type).copy())
        assert torch.equal(weights[ours], original), ours


def test_default_is_found_by_name(default_model_home: Path) -> None:
    started = time.perf_counter()
    loaded = load_model("default", device="cpu")
    print(f"loaded in {time.perf_counter() - started:.1f} s")
    assert loaded.name == "SmolLM2-135M-Instruct"
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
