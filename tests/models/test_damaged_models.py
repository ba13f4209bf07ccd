"""Model files with any value in any place: they load, or are refused in one sentence, and soon."""

from __future__ import annotations

import json
import os
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType as Kind
from hypothesis import given
from hypothesis import strategies as st

from streamchat.base.errors import ModelError, ModelNotFoundError, short
from streamchat.models.folder import tensor_shapes
from streamchat.models.load import load_model
from streamchat.models.read import read_tokenizer
from tests.support.models_help import save, tiny_llama, write_gguf

LIMIT_S = 60
"""Far above what a refusal takes (0.1 s), far below what building a million layers takes."""
ESCAPE = "\x1b[31mred"
DEEP = "[" * 100_000 + "]" * 100_000


@contextmanager
def limited() -> Iterator[None]:
    """Fail instead of running for ever."""

    def late(*_: object) -> None:
        raise AssertionError(f"not done within {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refusal(path: Path) -> str:
    """The sentence that refuses the model; '' when it loads."""
    with limited():
        try:
            load_model(str(path), device="cpu", dtype="float32")
            return ""
        except ModelError as error:
            sentence = str(error)
    assert sentence.isprintable()
    assert len(sentence) < 600
    return sentence


# --- GGUF -------------------------------------------------------------------------------------------------------

VALUES: list[tuple[Kind, Kind | None, Any]] = [
    (Kind.STRING, None, ESCAPE),
    (Kind.STRING, None, ""),
    (Kind.INT32, None, -1),
    (Kind.UINT32, None, 0),
    (Kind.UINT32, None, 10**6),
    (Kind.UINT64, None, 10**12),
    (Kind.FLOAT32, None, float("nan")),
    (Kind.BOOL, None, True),
    (Kind.ARRAY, Kind.INT32, [1, 2, 3]),
    (Kind.ARRAY, Kind.STRING, ["a", "b"]),
]
FIELDS = [
    *(f"llama.{name}" for name in ("context_length", "block_count", "embedding_length", "feed_forward_length")),
    *(f"llama.attention.{name}" for name in ("head_count", "head_count_kv", "layer_norm_rms_epsilon")),
    *(f"llama.{name}" for name in ("rope.freq_base", "rope.dimension_count", "vocab_size")),
    *(f"tokenizer.ggml.{name}" for name in ("model", "pre", "tokens", "token_type", "merges")),
    *(f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "eot")),
    "tokenizer.chat_template",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> gguf.GGUFReader:
    return gguf.GGUFReader(str(write_gguf(tmp_path_factory.mktemp("gguf") / "whole.gguf")))


def rewrite(whole: gguf.GGUFReader, path: Path, name: str, value: tuple[Kind, Kind | None, Any] | None) -> Path:
    """A copy of `whole` with another value in field `name`, or without that field."""
    writer = gguf.GGUFWriter(str(path), "llama")
    assert name in whole.fields
    for field in whole.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        inner = field.types[-1] if len(field.types) > 1 else None
        new = value if field.name == name else (field.types[0], inner, field.contents())
        if new is not None:
            writer.add_key_value(field.name, new[2], new[0], new[1])
    for tensor in whole.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.fuzz
@given(name=st.sampled_from(FIELDS), value=st.one_of(st.none(), st.sampled_from(VALUES)))
def test_any_metadata_of_a_gguf_file(
    whole: gguf.GGUFReader, tmp_path_factory: pytest.TempPathFactory, name: str, value: Any
) -> None:
    refusal(rewrite(whole, tmp_path_factory.mktemp("any") / "any.gguf", name, value))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("llama.block_count", (Kind.UINT32, None, 10**6), "says llama.block_count = 1,000,000 but has 21 tensors"),
        ("llama.embedding_length", (Kind.UINT64, None, 10**12), "no tensor with a dimension above 265"),
        ("llama.feed_forward_length", (Kind.INT32, None, -1), "describes a model that cannot be built"),
        ("llama.feed_forward_length", (Kind.UINT32, None, 96), "weights that do not match its metadata"),
        ("llama.rope.freq_base", (Kind.STRING, None, ESCAPE), "describes a model that cannot be built"),
        ("tokenizer.ggml.tokens", None, "cannot be read ('tokenizer.ggml.tokens')"),
        ("tokenizer.ggml.merges", (Kind.INT32, None, -1), "cannot be read ('int' object"),
        ("tokenizer.ggml.eot_token_id", (Kind.STRING, None, ESCAPE), "cannot be read (invalid literal"),
        ("tokenizer.chat_template", (Kind.ARRAY, Kind.INT32, [1, 2, 3]), "cannot be read ("),
    ],
)
def test_wrong_metadata_are_refused_with_the_value(
    whole: gguf.GGUFReader, tmp_path: Path, name: str, value: Any, words: str
) -> None:
    assert words in refusal(rewrite(whole, tmp_path / "wrong.gguf", name, value))


# --- folders ------------------------------------------------------------------------------------------------------

JSON_VALUES: list[object] = [None, ESCAPE, -1, 0, 10**6, 10**12, 1.5, float("nan"), True, [], [1, 2], {}, [[[]]]]
FILES = ("config.json", "generation_config.json", "tokenizer_config.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tiny_llama(), tmp_path / "model")


def set_value(path: Path, name: str, value: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {name: value}), encoding="utf-8")


def set_header(path: Path, header: str) -> None:
    """Put another header before the tensors of a safetensors file."""
    data = path.read_bytes()
    body = data[8 + struct.unpack("<Q", data[:8])[0] :]
    path.write_bytes(struct.pack("<Q", len(header.encode())) + header.encode() + body)


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    header: dict[str, Any] = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    return header


@pytest.fixture(scope="module")
def names_in(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The fields of each JSON file."""
    folder = save(tiny_llama(), tmp_path_factory.mktemp("names"))
    return {file: sorted(json.loads((folder / file).read_text(encoding="utf-8"))) for file in FILES}


@pytest.mark.fuzz
@given(data=st.data(), file=st.sampled_from(FILES), value=st.sampled_from(JSON_VALUES))
def test_any_value_in_a_folder(
    names_in: dict[str, list[str]],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    file: str,
    value: Any,
) -> None:
    folder = save(tiny_llama(), tmp_path_factory.mktemp("any"))
    set_value(folder / file, data.draw(st.sampled_from(names_in[file])), value)
    refusal(folder)


@pytest.mark.parametrize("number", [10**6, 10**7, 10**12])
@pytest.mark.parametrize(("name", "words"), [("num_hidden_layers", "21 tensors"), ("hidden_size", "above 300")])
def test_a_configuration_far_above_its_weights_is_refused_at_once(
    folder: Path, name: str, number: int, words: str
) -> None:
    set_value(folder / "config.json", name, number)
    sentence = refusal(folder)
    assert f"says {name} = {number:,} but has" in sentence
    assert words in sentence


@pytest.mark.parametrize("file", [*FILES, "tokenizer.json"])
def test_deep_json_is_one_sentence(folder: Path, file: str) -> None:
    (folder / file).write_text(DEEP, encoding="utf-8")
    assert "cannot be " in refusal(folder)


@pytest.mark.parametrize("value", [7, ESCAPE, {"a": 1}])
def test_architectures_that_are_not_a_list(folder: Path, value: Any) -> None:
    set_value(folder / "config.json", "architectures", value)
    assert "is not a model's configuration" in refusal(folder)


@pytest.mark.parametrize("part", ["dtype", "shape", "data_offsets", None])
@pytest.mark.parametrize("value", [*JSON_VALUES[:7], [10**18, 10**18], ["a", "b"]])
def test_wrong_headers_of_safetensors_are_refused(folder: Path, part: str | None, value: Any) -> None:
    path = folder / "model.safetensors"
    header = header_of(path)
    first = next(name for name in header if name != "__metadata__")
    header[first] = value if part is None else header[first] | {part: value}
    set_header(path, json.dumps(header))
    with pytest.raises(ModelNotFoundError, match="is damaged"):
        tensor_shapes(path)
    assert "is damaged" in refusal(folder)


@pytest.mark.parametrize("header", [DEEP, "[]", "{}", "7", ""])
def test_headers_that_are_not_a_table_of_tensors(folder: Path, header: str) -> None:
    set_header(folder / "model.safetensors", header)
    assert "is damaged" in refusal(folder)


def test_text_of_a_file_in_an_error_controls_no_terminal() -> None:
    assert short(f"no such thing: {ESCAPE}\x07\r\n\x9b2J") == "no such thing: [31mred 2J"


def test_a_path_that_is_not_utf_8_is_named_as_the_reason(tmp_path: Path) -> None:
    plan: Any = SimpleNamespace(name="it", folder=tmp_path / os.fsdecode(b"caf\xe9"))
    with pytest.raises(
        ModelNotFoundError, match=r"^the path .*caf.* is not valid UTF-8, .*; rename the folder, or set"
    ):
        read_tokenizer(plan)
