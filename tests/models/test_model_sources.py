"""Models as other programs leave them: caches in the middle of a fetch, blobs, metadata that is odd or missing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from streamchat.base import events as ev
from streamchat.base.errors import ModelNotFoundError, UnsupportedModelError
from streamchat.models.hub_cache import cached_snapshot, hub_cache_dir
from streamchat.models.load import load_model
from streamchat.models.resolve import resolve
from tests.support.models_help import make_tokenizer, save, tiny_llama, write_gguf
from tests.support.real_engine import running

# --- Hub cache -----------------------------------------------------------------------------------------------------

REPO = "owner/tiny"


def snapshot(commit: str, *, whole: bool = True, age_s: float = 0.0) -> Path:
    """A commit of `REPO` in the Hub cache; one that is not whole lacks its weights, as in the middle of a fetch."""
    folder = hub_cache_dir() / "models--owner--tiny" / "snapshots" / commit
    save(tiny_llama(), folder)
    if not whole:
        (folder / "model.safetensors").unlink()
    then = folder.stat().st_mtime - age_s
    os.utime(folder, (then, then))
    return folder


def point_main(commit: str) -> None:
    refs = hub_cache_dir() / "models--owner--tiny" / "refs"
    refs.mkdir(parents=True, exist_ok=True)
    (refs / "main").write_text(commit, encoding="utf-8")


def test_an_older_whole_snapshot_serves_while_the_newest_is_half_fetched() -> None:
    oldest, older = snapshot("a" * 40, age_s=200), snapshot("b" * 40, age_s=100)
    newest = snapshot("c" * 40, whole=False)
    point_main(newest.name)
    assert oldest.name != older.name
    assert cached_snapshot(REPO) == older
    source = resolve(REPO)
    assert (source.kind, source.location, source.available) == ("hub-cache", str(older), True)
    notes = load_model(REPO, device="cpu", dtype="float32").notes
    assert notes[0] == (
        f"The newest version of {REPO} (ccccccc) is incomplete in the local Hub cache, so an older one (bbbbbbb) is "
        "used; fetch the model again to get the newest"
    )


def test_main_comes_before_a_newer_snapshot_and_says_nothing() -> None:
    main, _ = snapshot("a" * 40, age_s=100), snapshot("b" * 40)
    point_main(main.name)
    assert cached_snapshot(REPO) == main
    assert load_model(REPO, device="cpu", dtype="float32").notes == ()


def test_nothing_whole_is_not_in_the_cache() -> None:
    point_main(snapshot("a" * 40, whole=False).name)
    assert cached_snapshot(REPO) is None
    point_main("b" * 40)  # nothing of it is there
    assert cached_snapshot(REPO) is None


# --- GGUF ----------------------------------------------------------------------------------------------------------


def test_a_blob_without_a_suffix_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    blob = write_gguf(tmp_path / "tiny.gguf").rename(tmp_path / f"sha256-{'0' * 64}")
    assert resolve(str(blob)).kind == "gguf"
    with torch.inference_mode():
        logits = load_model(str(blob), device="cpu", dtype="float32").model(input_ids=torch.tensor([[5, 6]])).logits
    assert torch.isfinite(logits).all()
    other = tmp_path / "notes"
    other.write_bytes(b"GGU")
    with pytest.raises(ModelNotFoundError, match="is not a model; give its folder, or a GGUF file"):
        resolve(str(other))


def test_a_file_without_a_pre_tokenizer_name_is_read_with_a_note(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", pre=None)
    for _ in range(2):  # converted, and from the converted copy
        loaded = load_model(str(path), device="cpu", dtype="float32")
        assert loaded.notes == (
            "tiny.gguf does not name its pre-tokenizer (tokenizer.ggml.pre), so GPT-2's is used; if replies are "
            "poor, use the model's safetensors folder or Hub id instead",
        )
    named = load_model(str(write_gguf(tmp_path / "named.gguf")), device="cpu", dtype="float32")
    assert named.notes == ()
    assert load_model(str(write_gguf(tmp_path / "spm.gguf", spm=True, pre=None)), device="cpu").notes == ()


@pytest.mark.parametrize(
    ("given", "first"),
    [
        ({}, ["▁he", "l", "o"]),
        ({"add_space_prefix": True}, ["▁he", "l", "o"]),
        ({"add_space_prefix": False}, ["he", "l", "o"]),
    ],
)
def test_the_space_in_front_of_a_text_is_the_files_choice(
    tmp_path: Path, given: dict[str, Any], first: list[str]
) -> None:
    path = write_gguf(tmp_path / "spm.gguf", spm=True, pre="default", **given)
    tokenizer = load_model(str(path), device="cpu", dtype="float32").tokenizer
    ids = tokenizer.encode("helo", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == first
    assert tokenizer.decode(ids) == "helo"
    spaced = tokenizer.encode(" helo", add_special_tokens=False)
    if given == {"add_space_prefix": False}:
        assert tokenizer.convert_ids_to_tokens(spaced) == ["▁he", "l", "o"]
        assert tokenizer.decode(spaced) == " helo"


# --- text and images -----------------------------------------------------------------------------------------------

TEXT = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def multimodal(kind: str, folder: Path) -> Any:
    """A random model of text and images, saved into `folder` with a tokenizer."""
    import transformers

    library: Any = transformers
    vision: dict[str, Any] = {**VISION, "image_size": 28, "patch_size": 14}
    text: dict[str, Any] = dict(TEXT)
    if kind == "Qwen3_5":
        vision = {"hidden_size": 16, "intermediate_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 32}
        text["layer_types"] = ["full_attention"] * 2
    torch.manual_seed(0)
    config = getattr(library, f"{kind}Config")(text_config=text, vision_config=vision)
    model = getattr(library, f"{kind}ForConditionalGeneration")(config).eval()
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["Gemma3", "Qwen3_5"])
def test_the_text_part_of_a_multimodal_checkpoint_is_served(kind: str, tmp_path: Path) -> None:
    import transformers

    if not hasattr(transformers, f"{kind}ForConditionalGeneration"):
        pytest.skip("this transformers does not know it")
    original = multimodal(kind, tmp_path / kind)
    ids = torch.tensor([[5, 6, 7, 8]])
    loaded = load_model(str(tmp_path / kind), device="cpu", dtype="float32")
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(input_ids=ids).logits, original(input_ids=ids).logits)


def test_a_chat_with_the_text_part_of_a_multimodal_checkpoint(tmp_path: Path) -> None:
    multimodal("Gemma3", tmp_path / "gemma3")
    model = load_model(str(tmp_path / "gemma3"), device="cpu", dtype="float32")
    with running(lambda *_: model, cache_size=64) as chat:
        chat.wait(ev.ModelReady)
        for text in ("hello", "and again", "once more"):
            assert chat.turn(text).finish_reason != "error"
        assert chat.of(ev.TokensEvicted)


def test_a_multimodal_checkpoint_without_a_text_model_is_refused(tmp_path: Path) -> None:
    multimodal("Mistral3", tmp_path / "mistral3")
    with pytest.raises(UnsupportedModelError, match="'mistral3', which is not a causal language model; choose one"):
        load_model(str(tmp_path / "mistral3"), device="cpu", dtype="float32")
