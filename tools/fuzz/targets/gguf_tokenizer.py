"""The metadata of a GGUF file: its config and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streamchat.base.errors import UnsupportedModelError, refuse
from streamchat.models.gguf.file import open_gguf, read_config
from streamchat.models.gguf.tokenizer import USE_OTHER_FORMAT, build_tokenizer, tokenizer_notes
from streamchat.models.quiet import quiet
from tools.fuzz.inputs import gguf_file
from tools.fuzz.target import Target


def run(data: bytes) -> None:
    """Read the config and use the tokenizer."""
    path = Path("model.gguf")
    path.unlink(missing_ok=True)  # the reader may still map the last one
    path.write_bytes(data)
    with quiet():
        reader, metadata = open_gguf(path)
        tokenizer_notes(path, metadata)
        refusals = []
        for use in (lambda: read_config(path, reader, metadata), lambda: _use(build_tokenizer(path, metadata, reader))):
            try:
                with refuse(f"{path} cannot be read", USE_OTHER_FORMAT):  # as the conversion does
                    use()
            except UnsupportedModelError as error:
                refusals.append(error)
        if refusals:
            raise refusals[0]


def _use(tokenizer: Any) -> None:
    ids = tokenizer("hello <|im_end|>\n 1")["input_ids"]
    assert isinstance(tokenizer.decode(ids), str)


def seeds() -> dict[str, bytes]:
    """One file for each way of building a tokenizer."""
    return {
        "byte-level": gguf_file("smollm"),
        "llama-bpe": gguf_file("llama-bpe"),
        "pieces": gguf_file("", model="llama"),
        "part": gguf_file("smollm", parts="two"),
    }


TARGET = Target(
    "gguf_tokenizer",
    run,
    seeds,
    ("streamchat.models.gguf", "streamchat.models.folder", "gguf.gguf_reader"),
    words=(
        b"tokenizer.ggml.tokens",
        b"\x08\0\0\0",
        b"\x09\0\0\0",
        b"\x06\0\0\0",
        b"\xff\xff\xff\x7f",
        b"qwen2",
        b"llama",
    ),
    suite_runs=40,
)
