"""Tiny models, tokenizers, GGUF files and wheels, made on the spot."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from streamchat.models.hub_cache import hub_cache_dir

TEXT = ["The capital of France is Paris.", "def f(x):\n    return x + 1\n", "one two three  four\n\nfive 12 345"] * 4


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with about 300 tokens and no chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(TEXT, trainer)
    ends = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **ends)  # type: ignore[no-untyped-call]


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random Llama with two layers and grouped heads."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))
    model.eval()  # type: ignore[no-untyped-call]
    return model


def tiny_neox(seed: int = 0) -> GPTNeoXForCausalLM:
    """A random model of Pythia's shape: partial rotary, parallel residual, untied output."""
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPTNeoXForCausalLM(config)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def save(model: Any, folder: Path, tokenizer: bool = True) -> Path:
    """`model` and a tokenizer in `folder`, as a user would have them."""
    model.save_pretrained(folder)
    if tokenizer:
        make_tokenizer().save_pretrained(folder)
    return folder


def in_hub_cache(repo_id: str, model: object) -> Path:
    """Put `model` where huggingface_hub would have put it."""
    repository = hub_cache_dir() / f"models--{repo_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    return save(model, repository / "snapshots" / "abc123")


# --- GGUF -----------------------------------------------------------------------------------------------------

GGUF_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
_LLAMA_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    # llama.cpp keeps rotary pairs beside each other, transformers half a head apart
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


SPM_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "e", "l", "o", "he", "▁he"]


def write_gguf(path: Path, *, arch: str = "llama", pre: str | None = "smollm", drop: str = "", **extra: Any) -> Path:
    """A GGUF file of `tiny_llama()` with a byte-level tokenizer; `drop` leaves one tensor out.

    With `spm=True` it has a SentencePiece vocabulary, `SPM_TOKENS`, and `add_space_prefix` where that is given.
    """
    import gguf

    vocabulary = [*GGUF_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "hel", "ĠĠ", "ĊĊ", "12"]
    merges = ["h e", "he l", "Ġ Ġ", "Ċ Ċ", "1 2"]
    types = [3, 3, 3, 4] + [1] * (len(vocabulary) - 4)
    spm = bool(extra.get("spm"))
    if spm:
        vocabulary = SPM_TOKENS
        types = [2, 3, 3] + [6] * 256 + [1] * (len(vocabulary) - 259)
        if extra["spm"] == "runs":
            vocabulary, types = vocabulary_with_runs()
    model = tiny_llama(vocab_size=len(vocabulary))
    config = model.config
    kv_heads = config.num_key_value_heads
    assert kv_heads is not None
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(extra.get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("llama" if spm else "gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types(types)
    if spm:
        writer.add_token_scores([0.0] * 259 + [-float(rank) for rank in range(len(vocabulary) - 259)])
        if "add_space_prefix" in extra:
            writer.add_add_space_prefix(extra["add_space_prefix"])
    else:
        writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for key, value in extra.get("metadata", {}).items():
        kinds = {str: gguf.GGUFValueType.STRING, int: gguf.GGUFValueType.INT32, float: gguf.GGUFValueType.FLOAT32}
        writer.add_key_value(key, value, kinds[type(value)])
    if "rope_scaling" in extra:
        writer.add_string(f"{arch}.rope.scaling.type", extra["rope_scaling"])
    if "rope_freqs" in extra:
        writer.add_tensor("rope_freqs.weight", np.asarray(extra["rope_freqs"], dtype=np.float32))
    for name, weight in model.state_dict().items():
        if (renamed := _gguf_name(name)) == drop:
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if ".q_proj" in name else kv_heads
            weight = _permuted(weight, heads)
        writer.add_tensor(renamed, weight.numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def vocabulary_with_runs() -> tuple[list[str], list[int]]:
    """Tokens and their types, in which runs of 2 to 31 spaces are user-defined, as in Gemma's."""
    runs = [" " * count for count in range(2, 32)]
    letters = ["▁", *"abcdefgh", "ab", "▁a"]
    tokens = [*SPM_TOKENS[:259], *runs, "<b>", *letters]
    return tokens, [2, 3, 3, *[6] * 256, *[4] * len(runs), 4, *[1] * len(letters)]


def _gguf_name(name: str) -> str:
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in fixed:
        return fixed[name]
    _model, _layers, number, rest = name.split(".", 3)
    return f"blk.{number}.{_LLAMA_NAMES[rest.removesuffix('.weight')]}.weight"


# --- wheels ---------------------------------------------------------------------------------------------------


def write_wheel(folder: Path, package: str, version: str, member: str, content: bytes) -> Path:
    """A wheel that pip accepts, with the one file `member` in it."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{package.replace('-', '_')}-{version}"
    files = {
        member: content,
        f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n".encode(),
        f"{stem}.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(data)}\n"
    files[f"{stem}.dist-info/RECORD"] = (record + f"{stem}.dist-info/RECORD,,\n").encode()
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path
