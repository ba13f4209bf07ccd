"""Small tokenizers made for a chat template: its control tokens are found by rule and become special tokens."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import PreTrainedTokenizerFast

BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"
TEXT = (
    "What is the capital of France? The capital of France is Paris.\n\nTell me a story. User: Assistant: You are a "
    "helpful assistant.\n\n### Instruction:\nBe brief. Blue, mostly! \n\n### Response:\nKöln grüßt. 三つ 🙂\n"
)
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Names between the brackets that models use for control tokens, as they stand in the rendered text.
_CONTROL = re.compile(r"<[|｜][^<>\n]{1,40}?[|｜]>|\[/?[A-Z_]+\]|<(?:start|end)_of_\w+>|\[\|/?\w+\|\]|</?(?:s|think)>")
_SPOKEN = "<think>", "</think>"
"""Names that are added, but are not special."""


def names_of(source: str, rendered: str) -> list[str]:
    """Return the names of control tokens in a template and in a conversation that it rendered."""
    return sorted({*_CONTROL.findall(rendered), *_CONTROL.findall(source), BOS, EOS})


def byte_level(names: list[str]) -> Any:
    """As GPT-2: bytes, and words with the space before them."""
    return _trained(names, pre_tokenizers.ByteLevel(add_prefix_space=False))


def llama_3(names: list[str]) -> Any:
    """As Llama 3 and Qwen: bytes, and punctuation together with the line ends behind it."""
    split = pre_tokenizers.Split(Regex(_LLAMA_3), "isolated")
    return _trained(names, pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)]))


def sentencepiece(names: list[str]) -> Any:
    """As Llama 2 and Mistral: a space before the text behind each control token."""
    return _pieces(names, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None)


def metaspace(names: list[str]) -> Any:
    """As later conversions of Llama 2 and Mistral: a space before the whole text only."""
    return _pieces(names, None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False))


KINDS: dict[str, Callable[[list[str]], Any]] = {
    "byte-level": byte_level,
    "llama-3": llama_3,
    "sentencepiece": sentencepiece,
    "metaspace": metaspace,
}


def _trained(names: list[str], words: PreTokenizer) -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = words
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator([TEXT] * 3, trainer)
    return _finished(backend, names)


def _pieces(names: list[str], normalizer: Any, words: PreTokenizer | None) -> Any:
    letters = sorted({*TEXT.replace(" ", ""), "▁"} - {"\n", "🙂"})
    merges = [("▁", letter) for letter in letters if letter.isalpha()] + [("▁", "▁"), ("▁B", "l"), ("u", "e")]
    tokens = [UNKNOWN, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *(a + b for a, b in merges)]
    backend = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            unk_token=UNKNOWN,
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    if normalizer is not None:
        backend.normalizer = normalizer
    if words is not None:
        backend.pre_tokenizer = words
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    return _finished(backend, names, unk_token=UNKNOWN)


def _finished(backend: Tokenizer, names: list[str], **options: Any) -> Any:
    special = [AddedToken(name, special=True, normalized=False) for name in names if name not in _SPOKEN]
    backend.add_special_tokens(special)
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in names if name in _SPOKEN])
    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False, **options)
