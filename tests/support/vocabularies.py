"""Small tokenizers shaped like those in use: how they split, what they add to the vocabulary, how they normalize."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.support import toy_tokenizer as toy

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _finish(
    backend: Tokenizer,
    special: list[str] = SPECIAL,
    plain: tuple[str, ...] = (),
    *,
    normalized: bool = False,
    **kw: Any,
) -> Any:
    backend.add_special_tokens([AddedToken(name, special=True, normalized=normalized) for name in special])
    backend.add_tokens([AddedToken(name, special=False, normalized=normalized) for name in plain])
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, eos_token="<|im_end|>", clean_up_tokenization_spaces=False, **kw
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _bytes() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator([toy.TEXT] * 3, trainer)
    return backend


def letters_added() -> Any:
    """As DeepSeek: byte-level, with letters, signs, emoji and words among the added tokens."""
    return _finish(_bytes(), plain=("ä", "ö", "ü", "ß", "€", "🙂", "<b>", "</b>", "covid19", "  "))


def one_letter_special() -> Any:
    """Control tokens of one letter, one of which begins a longer one."""
    return _finish(_bytes(), [*SPECIAL, "€", "<", "§§"])


def word_special() -> Any:
    """A control token that the template writes and that is not marked special."""
    return _finish(_bytes(), ["<|endoftext|>", "<s>"], plain=("<|im_start|>", "<|im_end|>", "<b>"))


def compatible() -> Any:
    """Normalizes with NFKC, control tokens as well."""
    backend = _bytes()
    backend.normalizer = normalizers.NFKC()
    return _finish(backend, normalized=True)


def lowercase() -> Any:
    """Normalizes to lowercase, control tokens as well."""
    backend = _bytes()
    backend.normalizer = normalizers.Lowercase()
    return _finish(backend, normalized=True)


def sentencepiece() -> Any:
    """As Llama 2: a space in front of each piece between control tokens, bytes for what it does not know."""
    return _pieces(normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None)


def metaspace() -> Any:
    """As later conversions of Llama 2: a space in front of the whole text."""
    return _pieces(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False))


def _pieces(normalizer: Any, words: Any) -> Any:
    letters = ["▁", *"abcdehilmnorstuw.,<|>_"]
    merges = [("▁", letter) for letter in letters[1:12]] + [("▁", "▁"), ("h", "e"), ("<", "|")]
    names = ["<unk>", *(f"<0x{value:02X}>" for value in range(256)), *letters, *(a + b for a, b in merges)]
    backend = Tokenizer(
        models.BPE(
            vocab={name: i for i, name in enumerate(names)}, merges=merges, unk_token="<unk>", byte_fallback=True
        )
    )
    if normalizer is not None:
        backend.normalizer = normalizer
    if words is not None:
        backend.pre_tokenizer = words
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finish(backend, unk_token="<unk>")


def words() -> Any:
    """Letters only, without a token for what it does not know: that is dropped."""
    letters = [*"abcdefghijklmnopqrstuvwxyz \n", "\N{REPLACEMENT CHARACTER}"]
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    return _finish(backend)


KINDS: dict[str, Callable[[], Any]] = {
    "letters-added": letters_added,
    "one-letter-special": one_letter_special,
    "word-special": word_special,
    "nfkc": compatible,
    "lowercase": lowercase,
    "sentencepiece": sentencepiece,
    "metaspace": metaspace,
}
