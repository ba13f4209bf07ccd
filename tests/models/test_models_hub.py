"""The Hub, played by a server on this machine: only what is needed is fetched, and every refusal is one sentence."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streamchat.base.errors import ExitCode, ModelNotFoundError, UnsupportedModelError
from streamchat.models import hub_access
from streamchat.models.load import load_model
from streamchat.models.resolve import resolve
from tests.support.fake_hub import FakeHub, serve_hub
from tests.support.models_help import save, tiny_llama, tiny_neox


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    yield from serve_hub(monkeypatch)


@pytest.fixture
def pythia(fake_hub: FakeHub, tmp_path: Path) -> Path:
    folder = save(tiny_neox(), tmp_path / "pythia")
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    (folder / "README.md").write_text("never fetched")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"never fetched")
    fake_hub.repositories["EleutherAI/pythia-70m"] = folder
    return folder


def test_fetches_what_is_needed_and_nothing_else(
    fake_hub: FakeHub, pythia: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    seen: list[tuple[str, int, int, str]] = []
    loaded = load_model("pythia-70m", device="cpu", dtype="float32", progress=lambda *step: seen.append(step))
    assert (loaded.name, loaded.source) == ("pythia-70m", "EleutherAI/pythia-70m")
    assert sorted(set(fake_hub.fetched)) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    steps = [step for step in seen if step[3] == "bytes"]
    total = sum((pythia / name).stat().st_size for name in set(fake_hub.fetched))
    assert steps[-1] == ("Fetching EleutherAI/pythia-70m", total, total, "bytes")
    done = [step[1] for step in steps]
    assert done == sorted(done)
    assert len(set(done)) > 3
    assert capfd.readouterr() == ("", "")
    # from now on the local copy is enough
    assert resolve("pythia-70m").kind == "hub-cache"
    fake_hub.close()
    assert load_model("EleutherAI/pythia-70m", device="cpu").source == "EleutherAI/pythia-70m"


def test_several_weight_files(fake_hub: FakeHub, tmp_path: Path) -> None:
    folder = save(tiny_llama(), tmp_path / "big")
    (folder / "model.safetensors").unlink()
    tiny_llama().save_pretrained(folder, max_shard_size="40KB")
    fake_hub.repositories["a/big"] = folder
    load_model("a/big", device="cpu")
    assert len([name for name in fake_hub.fetched if name.endswith(".safetensors")]) > 1


def test_cancelled_fetch_goes_on_where_it_stopped(fake_hub: FakeHub, pythia: Path) -> None:
    class CancelledError(Exception):
        pass

    def cancel(_stage: str, done: int = 0, total: int = 0, unit: str = "") -> None:
        if unit and done > total * 0.9:
            raise CancelledError

    with pytest.raises(CancelledError):
        load_model("pythia-70m", device="cpu", progress=cancel)
    assert resolve("pythia-70m").kind == "hub"  # nothing looks complete
    before = fake_hub.fetched.count("tokenizer.json")
    load_model("pythia-70m", device="cpu")
    assert fake_hub.fetched.count("tokenizer.json") == before


def refusal(name: str) -> str:
    with pytest.raises((ModelNotFoundError, UnsupportedModelError)) as caught:
        load_model(name, device="cpu")
    assert caught.value.exit_code == ExitCode.MODEL
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_model(fake_hub: FakeHub) -> None:
    assert refusal("nobody/nothing").startswith("There is no model nobody/nothing on 127.0.0.1")
    assert refusal("EleutherAI/pythia410m").endswith("did you mean pythia-410m?")


def test_gated_model(fake_hub: FakeHub, pythia: Path) -> None:
    fake_hub.gated.add("EleutherAI/pythia-70m")
    text = refusal("pythia-70m")
    assert f"accept them on {fake_hub.url}/EleutherAI/pythia-70m" in text
    assert "`hf auth login`" in text


def test_hub_with_a_fault(fake_hub: FakeHub, pythia: Path) -> None:
    fake_hub.status = 418
    assert "answered 418 for EleutherAI/pythia-70m; try again later" in refusal("pythia-70m")


def test_other_kind_of_model_is_refused_before_its_weights_are_fetched(fake_hub: FakeHub, pythia: Path) -> None:
    config = json.loads((pythia / "config.json").read_text())
    (pythia / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    assert "BertForMaskedLM" in refusal("pythia-70m")
    assert set(fake_hub.fetched) == {"config.json"}


def test_repository_without_safetensors(fake_hub: FakeHub, pythia: Path) -> None:
    (pythia / "model.safetensors").unlink()
    assert "has no safetensors weights" in refusal("pythia-70m")


def test_no_space(fake_hub: FakeHub, pythia: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: Usage)
    assert "1.0 kB are free; make room, or set HF_HOME" in refusal("pythia-70m")


def test_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")

    def never(*_args: Any, **_kwargs: Any) -> Any:
        raise AssertionError("huggingface_hub, with its retries, was asked")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", never)
    monkeypatch.setattr(hub_access, "fetch_file", never)
    text = refusal("pythia-410m")
    assert text.startswith("'pythia-410m' means EleutherAI/pythia-410m, which is not in the local Hub cache")
    assert "cannot be reached (Connection refused)" in text
    assert "--model default" in text
    assert refusal("pythia-41").startswith("'pythia-41' is not a folder, a .gguf file or an alias")
    assert refusal("pythia-41").endswith("; did you mean pythia-410m?")
    assert "did you mean" not in refusal("Qwen/Qwen3-1.7B")  # an alias means the same


def test_hanging_name_lookup_does_not_hang_us(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(hub_access, "PROBE_S", -0.9)
    monkeypatch.setattr(hub_access, "_ask", lambda _url: release.wait(30))
    try:
        assert "cannot be reached (no answer within" in refusal("pythia-410m")
    finally:
        release.set()


def test_forbidden_by_the_environment(fake_hub: FakeHub, pythia: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE forbids asking the Hub" in refusal("pythia-70m")
    assert fake_hub.fetched == []
