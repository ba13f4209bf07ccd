"""Binary files as first inputs, written by the libraries that write them for users."""

from __future__ import annotations

import tempfile
from pathlib import Path

import gguf
import numpy as np

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
TOKENS = ["<unk>", "<|im_start|>", "<|im_end|>", "h", "e", "l", "o", "he", "ll", "Ġ", "Ċ", "1"]
PIECES = ["<unk>", "<s>", "</s>", "▁", "h", "e", "l", "o", "▁he", "ll", "<0x0A>", "  "]


def gguf_file(pre: str, *, model: str = "gpt2", parts: str = "") -> bytes:
    """Return a tiny GGUF file with a tokenizer and one tensor.

    Args:
        pre: Its pre-tokenizer.
        model: Its kind of tokenizer: byte-level ('gpt2') or SentencePiece ('llama').
        parts: Its metadata about the number of its parts.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        writer = gguf.GGUFWriter(str(path), "llama")
        writer.add_name("tiny")
        writer.add_context_length(128)
        writer.add_embedding_length(8)
        writer.add_block_count(1)
        writer.add_feed_forward_length(8)
        writer.add_head_count(2)
        writer.add_head_count_kv(1)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(10000.0)
        writer.add_tokenizer_model(model)
        if model == "gpt2":
            writer.add_tokenizer_pre(pre)
            writer.add_token_list(TOKENS)
            writer.add_token_merges(["h e", "l l"])
            writer.add_token_types([2, 3, 3, *[1] * 8, 4])
        else:
            writer.add_token_list(PIECES)
            writer.add_token_scores([0.0] * len(PIECES))
            writer.add_token_types([2, 3, 3, *[1] * 7, 6, 4])
            writer.add_add_space_prefix(False)
        if parts:
            writer.add_string("split.count", parts)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template(TEMPLATE)
        writer.add_tensor("token_embd.weight", np.zeros((len(TOKENS), 8), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()
