"""Every byte of a model's files decides what is served from earlier work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from streamchat.base import paths
from streamchat.base.errors import ModelNotFoundError
from streamchat.base.progress import silent
from streamchat.models import contents
from streamchat.models.contents import BLOCK, file_digest, folder_digest
from streamchat.models.fingerprint import model_fingerprint
from streamchat.models.gguf import convert
from streamchat.models.gguf.convert import copy_folder
from streamchat.models.load import load_model
from tests.support.models_help import save, tiny_llama, write_gguf


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were hashed; all count as settled."""
    names: list[str] = []
    original = contents._hash

    def counting(file: Path, *more: Any) -> str:
        names.append(file.name)
        return original(file, *more)

    monkeypatch.setattr(contents, "_hash", counting)
    monkeypatch.setattr(contents, "SETTLED_NS", -1)
    return names


def change_byte(file: Path, at: int) -> None:
    """Write another byte in place; size, inode and mtime stay what they were."""
    before = file.stat()
    with file.open("rb+") as stream:
        stream.seek(at)
        old = stream.read(1)
        stream.seek(at)
        stream.write(bytes([old[0] ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_an_untouched_file_is_hashed_once(tmp_path: Path, hashed: list[str]) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(b"a" * 1000)
    first = file_digest(file, name="a")
    assert file_digest(file, name="a") == first
    link = tmp_path / "link.bin"
    link.symlink_to(file)
    assert file_digest(link, name="a") == first
    assert hashed == ["a.bin"]


@pytest.mark.parametrize("at", [0, 499, 999])
def test_a_byte_changed_in_place_is_seen_though_the_date_is_set_back(
    tmp_path: Path, hashed: list[str], at: int
) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(b"a" * 1000)
    first = file_digest(file, name="a")
    change_byte(file, at)
    assert file_digest(file, name="a") != first
    change_byte(file, at)
    assert file_digest(file, name="a") == first
    assert len(hashed) == 3


def test_a_file_put_in_its_place_is_seen(tmp_path: Path, hashed: list[str]) -> None:
    file, other = tmp_path / "a.bin", tmp_path / "b.bin"
    file.write_bytes(b"a" * 1000)
    first, about = file_digest(file, name="a"), file.stat()
    other.write_bytes(b"b" * 1000)
    os.utime(other, ns=(about.st_atime_ns, about.st_mtime_ns))
    other.replace(file)
    assert file_digest(file, name="a") != first


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path, hashed: list[str]) -> None:
    contents.SETTLED_NS = 60_000_000_000  # put back by the fixture
    file = tmp_path / "a.bin"
    file.write_bytes(b"a")
    assert file_digest(file, name="a") == file_digest(file, name="a")
    assert len(hashed) == 2


def test_every_block_counts_and_so_does_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "BLOCK", 4)
    digests = set()
    for data in (b"aaaabbbbcc", b"bbbbaaaacc", b"aaaabbbbcd", b"aaaabbbbc", b"aaaabbbb", b""):
        file = tmp_path / f"{data!r}"
        file.write_bytes(data)
        digests.add(file_digest(file, name="a"))
    assert len(digests) == 6
    assert BLOCK > 1 << 20


def test_a_damaged_memory_costs_a_hash_and_nothing_else(tmp_path: Path, hashed: list[str]) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(b"a")
    first = file_digest(file, name="a")
    for damaged in (b"", b"[]", b'{"state": 7, "digest": "x"}', b"\xff"):
        paths.cache_path("digests", os.fsencode(file.resolve()), ".json").write_bytes(damaged)
        assert file_digest(file, name="a") == first
    assert len(hashed) == 5


def test_progress_is_told_and_may_cancel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "BLOCK", 4)
    monkeypatch.setattr(contents, "LARGE", 10)
    file = tmp_path / "a.bin"
    file.write_bytes(b"a" * 10)
    told: list[tuple[str, int, int, str]] = []
    file_digest(file, name="tiny", progress=lambda *each: told.append(each))
    assert told == [("Checking tiny (once)", done, 10, "bytes") for done in (4, 8, 10)]

    def cancel(*each: object) -> None:
        raise KeyboardInterrupt

    os.utime(file)
    with pytest.raises(KeyboardInterrupt):
        file_digest(file, name="tiny", progress=cancel)


def test_names_in_a_folder_count(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"2")
    first = folder_digest(tmp_path, [tmp_path / "a", tmp_path / "b"], name="x")
    assert folder_digest(tmp_path, [tmp_path / "b", tmp_path / "a"], name="x") == first
    (tmp_path / "a").rename(tmp_path / "c")
    (tmp_path / "b").rename(tmp_path / "a")
    (tmp_path / "c").rename(tmp_path / "b")
    assert folder_digest(tmp_path, [tmp_path / "a", tmp_path / "b"], name="x") != first


# --- what is served ------------------------------------------------------------------------------------------------


def test_a_gguf_with_another_middle_has_another_copy(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(bytes(5 << 20))
    first = copy_folder(file)
    change_byte(file, 5 << 19)
    assert copy_folder(file) != first


def test_a_copy_with_a_name_of_before_goes_when_the_new_one_is_made(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    older = convert._first_copy(file)
    older.mkdir(parents=True)
    (older / "model.safetensors").write_bytes(b"old")
    made = convert.converted_copy(file, progress=silent)
    assert made != older
    assert made.is_dir()
    assert not older.exists()


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"gone\.gguf cannot be read: No such file or directory"):
        copy_folder(tmp_path / "gone.gguf")
    loop = tmp_path / "loop.gguf"
    loop.symlink_to(loop)
    with pytest.raises(ModelNotFoundError, match=r"loop\.gguf cannot be read: "):
        copy_folder(loop)


LLAMA = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


def test_two_changed_columns_are_served_new(tmp_path: Path) -> None:
    """Values between those that were once sampled: packed weights of before must not be taken."""
    model = tiny_llama(**LLAMA)
    folder = save(model, tmp_path / "llama")

    def logits(weights: str) -> torch.Tensor:
        loaded = load_model(str(folder), device="cpu", dtype="bfloat16", weights=weights).model
        with torch.inference_mode():
            return torch.as_tensor(loaded(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).logits).float()

    before = logits("int8")
    with torch.inference_mode():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, 1:3] += 5.0
    save(model, folder)
    native, packed = logits("native"), logits("int8")
    assert (packed - native).std() < 0.1 * native.std()
    assert (packed - before).std() > 0.5 * native.std()


def test_every_value_in_memory_counts() -> None:
    model = tiny_llama(**LLAMA)
    first = model_fingerprint(model)
    with torch.inference_mode():
        weight = model.model.layers[0].mlp.down_proj.weight
        weight[3, 1] += 1.0
        assert model_fingerprint(model) != first
        weight[3, 1] -= 1.0
    assert model_fingerprint(tiny_llama(**LLAMA)) == first
    assert model_fingerprint(model.bfloat16()) != first
