"""Tokenizer of a GGUF file.

Byte-level BPE is built here, because the pre-tokenizer decides the ids, and transformers knows only some of llama.cpp's
pre-tokenizers and ignores the others (such as the digits of SmolLM2). SentencePiece vocabularies are built by
transformers, which recovers their merges.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamchat.base.errors import UnsupportedModelError, refuse
from streamchat.telemetry.memory import return_freed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

USE_OTHER_FORMAT = "use the model's safetensors folder or Hub id instead"
CONTROL, USER_DEFINED = 3, 4
"""Values of `tokenizer.ggml.token_type` that are matched whole; only CONTROL tokens are special."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD_CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _words_and_digits(digits: str) -> str:
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


# `tokenizer.ggml.pre` -> pre-tokenizer pattern. None = GPT-2's own pattern.
_GPT2 = ("gpt-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "phi-2")
_GPT2_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_LLAMA3 = (
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "dbrx",
    "smaug-bpe",
)
_QWEN2 = ("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan")
_GPT4O = ("gpt-4o", "llama4", "kanana2")
SPLITS: dict[str, str | None] = {
    **dict.fromkeys(_GPT2 + _GPT2_SINGLE_DIGITS),
    **dict.fromkeys(_LLAMA3, _words_and_digits(r"\p{N}{1,3}")),
    **dict.fromkeys(_QWEN2, _words_and_digits(r"\p{N}")),
    "tekken": "|".join([*_WORD_CASES, r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", _SPACES]),
    **dict.fromkeys(
        _GPT4O,
        "|".join(
            [
                *(f"{case}{_CONTRACTIONS}?" for case in _WORD_CASES),
                r"\p{N}{1,3}",
                r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
                _SPACES,
            ]
        ),
    ),
}
_WHOLE_WORDS_FIRST = {*_LLAMA3, "tekken", *_GPT4O}
"""Pre-tokenizers with `ignore_merges`: a word that is in the vocabulary becomes one token, without merging."""
_NFC = {"qwen2"}
_BOS_BY_DEFAULT = {"llama3", "llama-v3", "llama-bpe"}


def build_tokenizer(gguf: Path, metadata: dict[str, Any], reader: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer of `gguf` with its special tokens and chat template.

    Args:
        gguf: The file, for messages and for transformers.
        metadata: All `tokenizer.*` and `general.*` values of the file.
        reader: The reader of the file, for transformers.

    Raises:
        UnsupportedModelError: The tokenizer cannot be rebuilt exactly.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        return _byte_level(gguf, metadata)
    if kind in ("llama", "gemma4"):
        return _by_transformers(gguf, metadata, reader)
    raise UnsupportedModelError(f"{gguf} has a tokenizer of type {kind!r}, which is not supported; {USE_OTHER_FORMAT}")


def read_saved(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer that `build_tokenizer` made and `save_pretrained` wrote to `folder`.

    `AutoTokenizer` gives the same, but parses the file five times.
    """
    import transformers

    arguments = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    for name in ("tokenizer_class", "backend"):
        arguments.pop(name, None)
    template = folder / "chat_template.jinja"
    if template.is_file():
        arguments["chat_template"] = template.read_text(encoding="utf-8")
    library: Any = transformers
    tokenizer: PreTrainedTokenizerBase = library.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), name_or_path=str(folder), **arguments
    )
    return_freed()  # parsing takes more than the tokenizer: 200 MB for one with 262,144 tokens
    return tokenizer


def tokenizer_notes(gguf: Path, metadata: dict[str, Any]) -> list[str]:
    """Return notes for the user about the tokenizer of `gguf`."""
    if metadata.get("tokenizer.ggml.model") == "gpt2" and not metadata.get("tokenizer.ggml.pre"):
        return [
            f"{gguf.name} does not name its pre-tokenizer (tokenizer.ggml.pre), so GPT-2's is used; if replies are "
            f"poor, {USE_OTHER_FORMAT}"
        ]
    return []


def special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """Return the ids of the `bos`, `eos`, `pad` and `unk` tokens that the file defines."""
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    found = {ours: metadata.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in names.items()}
    size = len(metadata.get("tokenizer.ggml.tokens") or ())
    return {name: int(value) for name, value in found.items() if value is not None and 0 <= int(value) < size}


def end_ids(metadata: dict[str, Any]) -> list[int]:
    """Return the ids that end a reply: end of text, of turn, of message."""
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    return list(dict.fromkeys(int(metadata[key]) for key in keys if metadata.get(key) is not None))


def _byte_level(gguf: Path, metadata: dict[str, Any]) -> PreTrainedTokenizerBase:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    pre = str(metadata.get("tokenizer.ggml.pre") or "gpt-2")
    if pre not in SPLITS:
        raise UnsupportedModelError(
            f"{gguf} uses an unknown pre-tokenizer ({pre!r}), so its ids would be wrong; {USE_OTHER_FORMAT}"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges") or ()]
    backend = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=pre in _WHOLE_WORDS_FIRST,
        )
    )
    split = SPLITS[pre]
    steps: list[Any] = []
    if split is not None:
        steps = [pre_tokenizers.Split(Regex(split), behavior="isolated")]
    elif pre in _GPT2_SINGLE_DIGITS:
        steps = [pre_tokenizers.Digits(individual_digits=True)]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)  # type: ignore[assignment,unused-ignore]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment,unused-ignore]
    if pre in _NFC:
        backend.normalizer = normalizers.NFC()  # type: ignore[assignment,unused-ignore]
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [
            AddedToken(token, normalized=False, special=special)
            for token, its_kind in zip(tokens, metadata.get("tokenizer.ggml.token_type") or (), strict=False)
            if its_kind == kind
        ]
        if special:
            backend.add_special_tokens(added)
        else:
            backend.add_tokens(added)
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", pre in _BOS_BY_DEFAULT)
    return _wrap(backend, bool(add_bos), metadata)


def _wrap(backend: Any, add_bos: bool, metadata: dict[str, Any]) -> PreTrainedTokenizerBase:
    import transformers

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    arguments: dict[str, Any] = {f"{name}_token": tokens[index] for name, index in special_ids(metadata).items()}
    # Cleaning up would remove spaces before punctuation when decoding.
    arguments["clean_up_tokenization_spaces"] = False
    if template := metadata.get("tokenizer.chat_template"):
        arguments["chat_template"] = template
    if length := metadata.get(f"{metadata['general.architecture']}.context_length"):
        arguments["model_max_length"] = int(length)
    library: Any = transformers
    tokenizer: PreTrainedTokenizerBase = library.PreTrainedTokenizerFast(
        tokenizer_object=backend, add_bos_token=add_bos, **arguments
    )
    return tokenizer


def _by_transformers(gguf: Path, metadata: dict[str, Any], reader: Any) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    from streamchat.models.gguf.reader import shared

    with shared(reader), refuse(f"The tokenizer of {gguf} cannot be rebuilt", USE_OTHER_FORMAT):
        read: Any = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name, local_files_only=True)
    state = json.loads(read.backend_tokenizer.to_str())
    if metadata.get("tokenizer.ggml.add_space_prefix") is False:
        _remove_space_prefix(state)
    defined = _hide_user_defined(state, metadata)
    backend = Tokenizer.from_str(json.dumps(state))
    backend.add_tokens(defined)
    # llama.cpp adds the BOS token to SentencePiece vocabularies unless the file says otherwise
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", metadata["tokenizer.ggml.model"] == "llama")
    return _wrap(backend, bool(add_bos), metadata)


def _hide_user_defined(state: dict[str, Any], metadata: dict[str, Any]) -> list[Any]:
    """Remove the merges of user-defined tokens with spaces from the state of a SentencePiece tokenizer.

    transformers builds those (Gemma's runs of 2 to 31) by merges, which split longer runs differently.

    Returns:
        The tokens, to be matched before merging, longest first.
    """
    from tokenizers import AddedToken

    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type") or ()
    defined = [token for token, kind in zip(tokens, kinds, strict=False) if kind == USER_DEFINED and " " in token]
    if not defined:
        return []
    vocabulary = state["model"]["vocab"]
    hidden = {token.replace(" ", "▁"): token for token in defined}
    for merged, token in hidden.items():
        if merged in vocabulary:
            vocabulary[token] = vocabulary.pop(merged)

    def is_left(pair: Any) -> bool:
        first, second = pair if isinstance(pair, list) else pair.split(" ", 1)
        return not {first, second, first + second} & hidden.keys()

    state["model"]["merges"] = [pair for pair in state["model"]["merges"] if is_left(pair)]
    return [AddedToken(token, normalized=False, special=False) for token in defined]


def _remove_space_prefix(state: dict[str, Any]) -> None:
    """Change the state of a SentencePiece tokenizer: no space before a text, and none stripped when decoding.

    transformers adds the prefix even if the file disables it.
    """

    def parts(part: dict[str, Any], of: str) -> list[dict[str, Any]]:
        return [inner for each in part[of] for inner in parts(each, of)] if of in part else [part]

    for name, of, dropped in (("normalizer", "normalizers", "Prepend"), ("decoder", "decoders", "Strip")):
        if state[name] is not None:
            kept = [part for part in parts(state[name], of) if part["type"] != dropped]
            state[name] = {"type": "Sequence", of: kept}
    for part in parts(state["pre_tokenizer"], "pretokenizers") if state["pre_tokenizer"] is not None else ():
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
