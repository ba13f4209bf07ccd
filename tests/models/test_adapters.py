"""LoRA adapters: merged exactly, part of the model's identity, and refused in one sentence if they do not fit."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError, ExitCode, ModelNotFoundError, UnsupportedModelError
from streamchat.base.paths import cache_dir
from streamchat.cli import main as cli
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.conversation.assemble import load_from_settings as load_configured
from streamchat.models import adapters as module
from streamchat.models.adapters import find_adapters, portable_setting
from streamchat.models.fingerprint import model_fingerprint
from streamchat.models.load import LoadedModel, load_from_settings, load_model
from streamchat.sessions.settings import resumed_configuration
from streamchat.sessions.transcripts.imported import read_sessions
from streamchat.store.records import SessionInfo
from streamchat.store.store import Store
from tests.support.adapters import LAYERS, add_by_definition, random_matrices, write_adapter
from tests.support.models_help import save, tiny_llama, tiny_neox, write_gguf
from tests.support.real_engine import Watched, running

pytest.importorskip("peft")
IDS = torch.tensor([[5, 17, 42, 99, 3, 250, 7, 7]])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(tiny_llama(), tmp_path / "base")


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return random_matrices(tiny_llama())


@pytest.fixture
def lora(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    return write_adapter(tmp_path / "lora", tensors)


def load(model: Path, adapter: object, **changes: Any) -> LoadedModel:
    asked = {"device": "cpu", "dtype": "float32", "kernels": "torch", **changes}
    return load_model(str(model), adapter=str(adapter), **asked)


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS, use_cache=False).logits
    return found


def test_logits_are_those_of_the_definition(base: Path, lora: Path, tensors: dict[str, Tensor]) -> None:
    loaded = load(base, lora)
    expected = logits(add_by_definition(tiny_llama(), tensors, 8 / 4))
    torch.testing.assert_close(logits(loaded.model), expected, rtol=1e-5, atol=1e-5)
    assert (logits(tiny_llama()) - expected).abs().max() > 0.01  # the adapter does something
    assert loaded.name == "base + lora"
    assert not any("lora" in name for name, _ in loaded.model.named_parameters())
    assert not any(weight.requires_grad for weight in loaded.model.parameters())
    assert not loaded.model.training


@pytest.mark.parametrize(
    ("config", "scale"),
    [({"use_rslora": True}, 8 / 2.0), ({"alpha_pattern": {"q_proj": 2, "down_proj": 2}}, 0.5), ({"r": 4}, 2.0)],
)
def test_scales_of_peft(
    base: Path, tmp_path: Path, tensors: dict[str, Tensor], config: dict[str, Any], scale: float
) -> None:
    loaded = load(base, write_adapter(tmp_path / "lora", tensors, **config))
    expected = logits(add_by_definition(tiny_llama(), tensors, scale))
    torch.testing.assert_close(logits(loaded.model), expected, rtol=1e-5, atol=1e-5)


def test_several_adapters_add_up(base: Path, lora: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    more = random_matrices(tiny_llama(), (LAYERS[0], "model.layers.1.self_attn.v_proj"), seed=2)
    second = write_adapter(tmp_path / "second", more)
    loaded = load(base, f"{lora}{os.pathsep}{second}")
    expected = add_by_definition(add_by_definition(tiny_llama(), tensors, 2.0), more, 2.0)
    torch.testing.assert_close(logits(loaded.model), logits(expected), rtol=1e-5, atol=1e-5)
    assert loaded.name == "base + lora + second"


def test_a_gguf_file_is_dequantized_for_it(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    plain = load(file, "")
    tensors = random_matrices(plain.model)
    expected = logits(add_by_definition(plain.model, tensors, 2.0))
    loaded = load(file, write_adapter(tmp_path / "lora", tensors))
    torch.testing.assert_close(logits(loaded.model), expected, rtol=1e-5, atol=1e-5)


def test_the_fingerprint_tells_adapters_apart(
    base: Path, lora: Path, tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    next(iter(changed.values()))[0, 0] += 1e-3
    other = write_adapter(tmp_path / "other", changed)
    half = write_adapter(tmp_path / "half", tensors, alpha=4)
    both, reversed_ = f"{lora}{os.pathsep}{other}", f"{other}{os.pathsep}{lora}"
    found = [model_fingerprint(load(base, each).model) for each in ("", lora, other, half, both, reversed_)]
    assert len(set(found)) == 6
    assert model_fingerprint(load(base, lora).model) == found[1]


def test_quantized_copies_do_not_mix(base: Path, lora: Path, tmp_path: Path) -> None:
    """A second start reads the copy on disk; each adapter has its own."""
    weights = {"weights": "int8", "dtype": "bfloat16", "kernels": "auto"}
    first = {str(each): logits(load(base, each, **weights).model) for each in ("", lora)}
    folders = set((cache_dir() / "weights").iterdir())
    assert len([folder for folder in folders if folder.is_dir()]) == 2
    for each in ("", lora, ""):
        assert torch.equal(logits(load(base, each, **weights).model), first[str(each)])
    assert set((cache_dir() / "weights").iterdir()) == folders
    assert (first[""] - first[str(lora)]).abs().max() > 0.01


def test_the_copy_needs_no_peft(base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("merged again")

    loaded = load(base, lora, weights="int8", dtype="bfloat16", kernels="auto")
    if not loaded.kernels:
        pytest.skip("needs compiled kernels")
    monkeypatch.setattr(module, "_merged", never)
    assert load(base, lora, weights="int8", dtype="bfloat16", kernels="auto").name == "base + lora"


def refusal(model: Path, adapter: object) -> str:
    with pytest.raises((ModelNotFoundError, UnsupportedModelError)) as caught:
        load(model, adapter)
    assert caught.value.exit_code == ExitCode.MODEL
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_model(base: Path, lora: Path, tmp_path: Path) -> None:
    other = save(tiny_neox(), tmp_path / "neox")
    text = refusal(other, lora)
    assert "(it was trained on someone/base) changes model.layers.0.self_attn.q_proj, which neox does not have" in text
    wide = save(tiny_llama(hidden_size=64), tmp_path / "wide")
    assert "with 32 x 32 weights, and wide has 64 x 64 there; give its base model to --model" in refusal(wide, lora)


def test_a_transposed_pair_is_another_shape(base: Path, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    layer = LAYERS[1]
    wrong = {f"{layer}.lora_A.weight": torch.ones(4, 32), f"{layer}.lora_B.weight": torch.ones(64, 4)}
    assert "cannot be merged into base" in refusal(base, write_adapter(tmp_path / "wrong", wrong))


def test_tied_weights_are_not_changed_behind_the_other_layer(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    tied = save(model, tmp_path / "tied")
    adapter = write_adapter(tmp_path / "lora", random_matrices(model, ("lm_head",)))
    assert "changes lm_head, whose weights tied shares with model.embed_tokens" in refusal(tied, adapter)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "evil_module"}, "makes peft import a Python module"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "repeats layers that share weights"),
        ({"use_dora": True}, "is a DoRA adapter without its magnitudes"),
    ],
)
def test_entries_that_run_code_or_merge_wrongly(
    entry: dict[str, Any],
    words: str,
    base: Path,
    tmp_path: Path,
    tensors: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    assert words in refusal(base, write_adapter(tmp_path / "odd", tensors, **entry))


def test_damaged_and_other_adapters(base: Path, lora: Path, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    config, weights = lora / "adapter_config.json", lora / "adapter_model.safetensors"
    good = config.read_text()
    assert f"There is no adapter folder {str(tmp_path / 'nothing')!r}" in refusal(base, tmp_path / "nothing")
    assert "has no adapter_config.json, so it is not a LoRA adapter" in refusal(base, base)
    assert "is a GGUF file" in refusal(base, tmp_path / "lora.gguf")
    for text, words in (("{", "cannot be read"), ("[]", "of type 'None'"), ('{"peft_type": "IA3"}', "of type 'IA3'")):
        config.write_text(text)
        assert words in refusal(base, lora)
    config.write_text(good.replace('"r": 4', '"r": 5'))
    assert "cannot be merged into base" in refusal(base, lora)
    config.write_text(good.replace('"down_proj", ', "").replace(', "down_proj"', ""))
    assert f"does not list {LAYERS[1]}" in refusal(base, lora) or "cannot be merged" in refusal(base, lora)
    config.write_text(good)
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "is damaged" in refusal(base, lora)
    weights.unlink()
    assert "has no weights (adapter_model.safetensors)" in refusal(base, lora)
    (lora / "adapter_model.bin").write_bytes(b"")
    assert "a format that can run code" in refusal(base, lora)
    half = {name: tensor for name, tensor in tensors.items() if "lora_A" in name}
    assert "lacks a matrix for model.layers.0.self_attn.q_proj" in refusal(base, write_adapter(tmp_path / "half", half))
    broken = {**tensors, f"{LAYERS[0]}.lora_A.weight": torch.full((4, 32), torch.nan)}
    assert "cannot be merged into base (NaNs detected" in refusal(base, write_adapter(tmp_path / "nan", broken))


def test_without_peft(base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    with pytest.raises(ConfigError, match=r"pip install 'streamchat\[adapters\]'"):
        load(base, lora)
    assert load(base, "").name == "base"


def test_setting_and_flag(base: Path, lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(model=str(base), adapter=str(lora), device="cpu", kernels="torch")
    assert load_from_settings(settings).name == "base + lora"
    assert cli.main(["config", "--adapter", "one", "--adapter", "two"]) == 0
    assert f'adapter = "one{os.pathsep}two"' in capsys.readouterr().out
    assert portable_setting(f"one{os.pathsep} two ") == f"{Path.cwd() / 'one'}{os.pathsep}{Path.cwd() / 'two'}"
    assert find_adapters(" ") == ()
    assert cli.main(["--model", str(base), "--adapter", "none"]) == ExitCode.MODEL
    assert "There is no adapter folder" in capsys.readouterr().err
    assert cli.main(["doctor", "--model", str(base), "--adapter", str(lora), "--kernels", "torch"]) == 0
    assert str(lora) in capsys.readouterr().out


# --- saved conversations ----------------------------------------------------------------------------------------


def resumed(saved: dict[str, Any], given: Settings, **origins: str) -> str:
    """The adapter that a session with the settings `saved` continues with."""
    info = SessionInfo("abc", "", 0.0, 0.0, "m", "m", "float32", "f", "t", saved)
    return resumed_configuration(Configuration(given, origins), info).settings.adapter


def test_a_session_continues_with_its_adapter_and_not_with_another_one() -> None:
    with_adapter = {"model": "base", "adapter": "/mine"}
    assert resumed(with_adapter, Settings()) == "/mine"
    assert resumed({"model": "base"}, Settings(adapter="/other")) == ""  # saved before the setting existed
    assert resumed(with_adapter, Settings(adapter="/other"), adapter="--adapter") == "/other"
    assert resumed(with_adapter, Settings(model="another"), model="--model") == ""


def test_an_imported_file_brings_no_adapter() -> None:
    text = json.dumps({"messages": [{"role": "user", "content": "hi"}], "settings": {"adapter": "/x", "top_p": 0.5}})
    Path("chat.json").write_text(text)
    [session] = read_sessions(Path("chat.json"))
    assert "adapter" not in session.settings


def test_a_snapshot_of_one_adapter_is_not_used_by_another(
    base: Path, lora: Path, tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    """Also not if the other one is in the same folder."""
    database = tmp_path / "data" / "streamchat.db"

    def start(session: str | None = None) -> Watched:
        asked: dict[str, Any] = {"model": str(base), "adapter": str(lora), "device": "cpu", "kernels": "torch"}
        with running(load_configured, store=database, session=session, **asked) as chat:
            chat.wait(ev.ModelReady)
            if session is None:
                chat.turn("hello")
        return chat

    start()
    with Store(database) as store:
        session = store.find("last")
    assert (session.model_name, session.settings["adapter"]) == ("base + lora", str(lora))
    assert start(session.id).of(ev.ConversationResumed)[0].prefilled == 0
    shutil.rmtree(lora)
    write_adapter(lora, {name: tensor * 2 for name, tensor in tensors.items()})
    again = start(session.id)
    assert again.of(ev.ConversationResumed)[0].prefilled > 0
    assert any("saved with another model" in notice.text for notice in again.of(ev.Notice))
