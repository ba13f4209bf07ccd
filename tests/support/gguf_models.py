"""Tiny random models in GGUF files of any type, and the same models with the weights that the files mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from tokenizers import pre_tokenizers

from tests.support.models_help import GGUF_TOKENS, TEMPLATE

TOKENS = [*GGUF_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "hel", "ĠĠ", "ĊĊ", "12"]
"""Not a multiple of 16."""
SIZES = {"embedding_length": 256, "feed_forward_length": 512, "block_count": 2, "context_length": 256}
HEADS = 4
Choose = Callable[[str], Type]
"""Name of a tensor -> its type."""


class Family:
    """Names and layouts of an architecture.

    Args:
        arch: As GGUF files name it.
        kv_heads: Key heads.
        tied: Whether there is no output layer.
        biases: Whether queries, keys and values have a bias.
    """

    def __init__(self, arch: str, kv_heads: int = 2, tied: bool = True, biases: bool = False) -> None:
        self.arch, self.kv_heads, self.tied, self.biases = arch, kv_heads, tied, biases

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes in the file; transformers takes some of GPT-2's for granted."""
        changes = {"feed_forward_length": 1024, "context_length": 1024} if self.arch == "gpt2" else {}
        return SIZES | changes

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors of the file, rows first."""
        width, inner = self.sizes["embedding_length"], self.sizes["feed_forward_length"]
        kv = width // HEADS * self.kv_heads
        found: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(TOKENS), width), "output_norm.weight": (width,)}
        if not self.tied:
            found["output.weight"] = (len(TOKENS), width)
        for number in range(SIZES["block_count"]):
            at = f"blk.{number}"
            found |= {f"{at}.attn_norm.weight": (width,), f"{at}.ffn_norm.weight": (width,)}
            found |= {f"{at}.attn_output.weight": (width, width), f"{at}.ffn_down.weight": (width, inner)}
            found |= {f"{at}.ffn_up.weight": (inner, width)}
            if self.arch == "gpt2":
                found |= {f"{at}.attn_qkv.weight": (3 * width, width), f"{at}.attn_qkv.bias": (3 * width,)}
                found |= {
                    f"{at}.{name}.bias": (width,) for name in ("attn_norm", "ffn_norm", "attn_output", "ffn_down")
                }
                found |= {f"{at}.ffn_up.bias": (inner,)}
                continue
            rows = {"attn_q": width, "attn_k": kv, "attn_v": kv}
            found |= {f"{at}.{name}.weight": (size, width) for name, size in rows.items()}
            found |= {f"{at}.ffn_gate.weight": (inner, width)}
            if self.biases:
                found |= {f"{at}.{name}.bias": (size,) for name, size in rows.items()}
            if self.arch == "gemma3":
                found |= {f"{at}.{name}.weight": (width,) for name in ("post_attention_norm", "post_ffw_norm")}
                found |= {f"{at}.{name}.weight": (width // HEADS,) for name in ("attn_q_norm", "attn_k_norm")}
        if self.arch == "gpt2":
            found |= {"position_embd.weight": (self.sizes["context_length"], width), "output_norm.bias": (width,)}
        return found

    def as_transformers(self, name: str, weights: torch.Tensor) -> torch.Tensor:
        """Return the weights of the tensor `name` as transformers stores them."""
        if self.arch == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            heads = HEADS if name.endswith("attn_q.weight") else self.kv_heads
            pairs = weights.view(heads, -1, 2, weights.shape[1])  # neighboring rows are half a head apart there
            return torch.cat([pairs[:, :, 0], pairs[:, :, 1]], 1).reshape(weights.shape)
        if self.arch == "gemma3" and "norm" in name:
            return weights - 1
        is_conv = self.arch == "gpt2" and name.startswith("blk") and weights.dim() == 2
        return weights.T.contiguous() if is_conv else weights


FAMILIES = {
    "llama": Family("llama"),
    "llama untied": Family("llama", tied=False),
    "qwen2": Family("qwen2", biases=True),
    "gemma3": Family("gemma3", kv_heads=1),
    "gpt2": Family("gpt2", kv_heads=HEADS),
}


def write_family(path: Path, family: Family, choose: Choose) -> dict[str, torch.Tensor]:
    """Write a random model; return the float32 weights that the file means, by name in the file, for transformers."""
    random = np.random.default_rng(7)
    writer = gguf.GGUFWriter(str(path), family.arch)
    for name, size in family.sizes.items():
        writer.add_uint32(f"{family.arch}.{name}", size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(family.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    if family.arch == "gemma3":
        writer.add_key_length(SIZES["embedding_length"] // HEADS)
        writer.add_value_length(SIZES["embedding_length"] // HEADS)
        writer.add_sliding_window(64)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, 4] + [1] * (len(TOKENS) - 4))
    writer.add_token_merges(["h e", "he l", "Ġ Ġ", "Ċ Ċ", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    meant: dict[str, torch.Tensor] = {}
    for name, shape in family.shapes().items():
        kind = choose(name) if len(shape) == 2 and "position" not in name else Type.F32
        numbers = random.normal(0, 0.06 if len(shape) == 2 else 0.2, shape).astype(np.float32)
        data = numbers + 1 if "norm.weight" in name else numbers
        if kind != Type.F32:
            data = _blocks(random, kind, shape) if kind in _SCALES_AT else gguf.quantize(numbers, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        meant[name] = family.as_transformers(name, torch.from_numpy(gguf.dequantize(data, kind).copy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


_SCALES_AT: Mapping[Type, tuple[tuple[int, float], ...]] = {
    Type.Q2_K: ((80, 0.01), (82, 0.01)),
    Type.Q3_K: ((108, 0.0015),),
    Type.Q4_K: ((0, 2e-4), (2, 1.5e-3)),
    Type.Q5_K: ((0, 1e-4), (2, 1.5e-3)),
    Type.IQ4_NL: ((0, 8e-4),),
    Type.Q6_K: ((208, 4e-5),),
}
"""For types that gguf only dequantizes: where the float16 scales of a block are, and their values."""


def _blocks(random: np.random.Generator, kind: Type, shape: tuple[int, ...]) -> Any:
    """Return random blocks of a type, with random scales of this size."""
    columns, size = gguf.GGML_QUANT_SIZES[kind]
    count = shape[0] * shape[1] // columns
    data = random.integers(0, 256, (count, size), np.uint8)
    for at, scale in _SCALES_AT[kind]:
        data[:, at : at + 2] = (scale * random.uniform(0.5, 1.5, (count, 1))).astype(np.float16).view(np.uint8)
    return data.reshape(shape[0], -1)
