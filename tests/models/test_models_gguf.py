"""GGUF files: converted exactly, once, and refused in one sentence where that is impossible."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from streamchat.base.errors import ModelNotFoundError, UnsupportedModelError
from streamchat.base.progress import silent
from streamchat.models.gguf.convert import CONVERTER, converted_copy, copy_folder
from streamchat.models.load import load_model
from streamchat.models.staging import models_dir, read_manifest
from tests.support.models_help import TEMPLATE, tiny_llama, vocabulary_with_runs, write_gguf


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


def test_converted_model_computes_what_the_original_computes(gguf_file: Path) -> None:
    loaded = load_model(str(gguf_file), dtype="float32", device="cpu")
    original = tiny_llama(vocab_size=loaded.model.config.vocab_size)
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, original(ids).logits)
    assert loaded.name == "tiny"
    assert loaded.source == str(gguf_file)
    assert loaded.model.generation_config is not None
    assert loaded.model.generation_config.eos_token_id == [2, 0]  # end of text and end of turn
    assert (loaded.model.config.rope_parameters["rope_theta"], loaded.model.config.bos_token_id) == (10000.0, 1)


def test_tokenizer_follows_the_metadata(gguf_file: Path) -> None:
    tokenizer = load_model(str(gguf_file), device="cpu").tokenizer
    text = "hel 12  12\n\n1\n<think>  café 🙂👍🏽\tif x:\n    y = [1, 2] ."
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert "12" not in tokens  # digits are cut one by one, although the vocabulary has a merged pair
    assert tokens[:9] == ["hel", "Ġ", "1", "2", "ĠĠ", "1", "2", "ĊĊ", "1"]
    assert "<think>" in tokens  # user-defined: whole, but not special
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.encode("<|im_end|>") == [2]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.encode("hel")[0] != tokenizer.bos_token_id
    assert tokenizer.clean_up_tokenization_spaces is False
    assert tokenizer.chat_template == TEMPLATE


def test_other_pre_tokenizer_keeps_pairs_of_digits(tmp_path: Path) -> None:
    tokenizer = load_model(str(write_gguf(tmp_path / "a.gguf", pre="llama-bpe")), device="cpu").tokenizer
    ids = tokenizer.encode("hel12")
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_start|>", "hel", "12"]  # and this kind begins with BOS


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        (" " * 31, [31]),
        (" " * 32, [31, "▁"]),
        ("a" + " " * 40 + "b", ["a", 31, 9, "b"]),
        (" " * 100, [31, 31, 31, 7]),
        ("ab a  b", ["ab", "▁a", 2, "b"]),
        ("a<b>b", ["a", "<b>", "b"]),
    ],
)
def test_user_defined_tokens_are_matched_longest_first(tmp_path: Path, text: str, tokens: list[int | str]) -> None:
    """As llama.cpp does, before anything is merged: a run of spaces is cut into the longest tokens from the left."""
    path = write_gguf(tmp_path / "a.gguf", spm="runs", add_space_prefix=False)
    tokenizer = load_model(str(path), device="cpu").tokenizer
    vocabulary, _types = vocabulary_with_runs()
    expected = [vocabulary.index(" " * token if isinstance(token, int) else token) for token in tokens]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == expected
    assert tokenizer.decode(ids) == text


def test_copy_is_made_once_and_follows_the_contents(gguf_file: Path, tmp_path: Path) -> None:
    before = sorted(gguf_file.parent.iterdir())
    folder = converted_copy(gguf_file, progress=silent)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    moved = tmp_path / "elsewhere" / "tiny.gguf"
    moved.parent.mkdir()
    gguf_file.rename(moved)
    assert converted_copy(moved, progress=silent) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert sorted(tmp_path.iterdir()) == [moved.parent]
    assert before == [gguf_file]  # nothing was written beside the file
    changed = write_gguf(tmp_path / "tiny.gguf", pre="refact")  # as many bytes, other contents
    assert changed.stat().st_size == moved.stat().st_size
    assert copy_folder(changed) != folder


def test_damaged_copy_is_made_again(gguf_file: Path) -> None:
    folder = converted_copy(gguf_file, progress=silent)
    (folder / "model.safetensors").write_bytes(b"cut")
    assert read_manifest(folder) is None
    assert converted_copy(gguf_file, progress=silent) == folder
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest["converter"] == CONVERTER


def test_cancelled_conversion_leaves_nothing(gguf_file: Path) -> None:
    class CancelledError(Exception):
        pass

    def cancel(_stage: str, done: int = 0, _total: int = 0, _unit: str = "") -> None:
        if done == 5:
            raise CancelledError

    with pytest.raises(CancelledError):
        converted_copy(gguf_file, progress=cancel)
    assert [path.name for path in models_dir().iterdir() if not path.name.endswith(".lock")] == []
    assert converted_copy(gguf_file, progress=silent).is_dir()  # the lock was released too


def test_llama3_position_factors_are_restored(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stretched = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, rope_parameters=stretched)
    frequencies, _scale = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    factors = (1 / 500_000.0 ** (torch.arange(0, 8, 2) / 8) / frequencies).tolist()
    assert 1 < factors[2] < 8  # the smooth part is covered
    path = write_gguf(tmp_path / "a.gguf", rope_freqs=factors, rope_theta=500_000.0)
    assert load_model(str(path), device="cpu").model.config.rope_parameters == stretched
    odd = write_gguf(tmp_path / "b.gguf", rope_freqs=[1.0, 2.0, 3.0, 4.0])
    with pytest.raises(UnsupportedModelError, match="factors that are not those of Llama 3"):
        load_model(str(odd), device="cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pre": "someone-elses"}, r"unknown pre-tokenizer \('someone-elses'"),
        ({"rope_scaling": "yarn"}, r"uses RoPE scaling \(yarn\)"),
        ({"drop": "blk.1.ffn_up.weight"}, "lacks 1 of the model's weights .*layers.1.mlp.up_proj"),
        ({"arch": "gptneox"}, "'gptneox' model and cannot be read: transformers does not read"),
    ],
)
def test_unusable_files_are_refused_in_one_sentence(tmp_path: Path, changes: dict[str, str], words: str) -> None:
    path = write_gguf(tmp_path / "bad.gguf", **changes)
    with pytest.raises(UnsupportedModelError, match=words) as caught:
        load_model(str(path), device="cpu")
    assert "\n" not in str(caught.value)
    assert not [path for path in models_dir().iterdir() if path.is_dir()]


def test_disk_that_fills_up_while_saving(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.LlamaForCausalLM.save_pretrained", full)
    with pytest.raises(ModelNotFoundError, match=r"could not be stored in .* \(the disk is full\); make room"):
        load_model(str(gguf_file), device="cpu")
    assert not [path for path in models_dir().iterdir() if path.is_dir()]


def test_too_little_space_is_known_before(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("streamchat.models.staging.shutil.disk_usage", lambda _folder: Usage)
    with pytest.raises(ModelNotFoundError, match=r"needs up to 1\d\d kB of disk space .* 1\.0 kB are free"):
        load_model(str(gguf_file), device="cpu")


def test_too_little_memory_to_convert(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 1000

    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory)
    with pytest.raises(ModelNotFoundError, match=r"takes \d+ kB of memory and 1\.0 kB are available"):
        load_model(str(gguf_file), device="cpu")


def test_callback_that_cannot_write_is_not_mistaken_for_a_full_disk(gguf_file: Path) -> None:
    def broken(*_step: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        converted_copy(gguf_file, progress=broken)


def test_cut_off_file(gguf_file: Path) -> None:
    gguf_file.write_bytes(gguf_file.read_bytes()[:-50_000])
    with pytest.raises(ModelNotFoundError, match="not a complete GGUF file"):
        load_model(str(gguf_file), device="cpu")


def test_no_gguf_at_all(tmp_path: Path) -> None:
    path = tmp_path / "page.gguf"
    path.write_text("<html>not found</html>")
    with pytest.raises(ModelNotFoundError, match="not a complete GGUF file"):
        load_model(str(path), device="cpu")
