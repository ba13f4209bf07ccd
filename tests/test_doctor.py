"""`streamchat doctor`: everything there is to know, and what is broken by name."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from streamchat import __version__, cli, paths
from streamchat.store.store import Store
from tests.models_help import save, tiny_llama
from tests.test_cli import run


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code and report."""
    code = cli.main(["doctor", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


def test_what_is_here_and_what_would_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tiny_llama(), tmp_path / "tiny")
    Store().close()
    code, report = told(capsys, "--model", str(folder), "--device", "cpu", "--dtype", "float32")
    assert (code, report["problems"]) == (0, [])
    assert report["versions"]["streamchat"] == __version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["device"]["devices"][-1] == "cpu"
    assert report["terminal"]["face"] == "pipe"
    database = report["files"]["conversations"]
    assert database == {"path": str(Store().path), "bytes": Store().path.stat().st_size}
    assert report["files"]["replays"]["bytes"] is None
    chat = report["chat"]
    assert (chat["device"], chat["dtype"]) == ("cpu (from --device)", "float32 (from --dtype)")
    assert chat["weights bytes"] == 4 * sum(p.numel() for p in tiny_llama().parameters())
    assert report["settings"]["model"] == f"{folder}  (from --model)"


def test_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--model", "pythia-410m"]) == 0
    out = capsys.readouterr().out
    assert f"streamchat         {__version__}" in out
    assert "EleutherAI/pythia-410m, not here yet: fetched at the first start" in out
    assert out.endswith("no problem found\n")


def test_what_is_broken_is_named_and_the_rest_is_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("config.toml").write_text("[streamchat]\n[cache]\ncache_size = 3\n")
    monkeypatch.setitem(sys.modules, "psutil", None)
    paths.private_dir(paths.data_dir()).chmod(0o755)
    code, report = told(capsys, "--model", "./missing")
    assert code == 1
    settings, device, files = report["problems"]
    assert settings.startswith("settings: config.toml: cache_size = 3 is not legal")
    assert device.startswith("device: ModuleNotFoundError: ")
    assert files.startswith(f"{paths.data_dir()} can be read by other users")
    assert {"versions", "terminal", "files", "chat"} <= set(report)


def test_a_model_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, report = told(capsys, "--model", "./missing")
    assert (code, len(report["problems"])) == (1, 1)
    assert report["problems"][0].startswith("chat: There is no folder 'missing'")


def test_versions_outside_their_range_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = metadata.version

    def version(package: str) -> str:
        if package == "gguf":
            raise metadata.PackageNotFoundError(package)
        return "1.0" if package == "transformers" else real(package)

    monkeypatch.setattr(metadata, "version", version)
    code, report = told(capsys)
    assert code == 1
    assert report["problems"][0] == "gguf is not installed; install streamchat again with pip"
    assert report["problems"][1].startswith("transformers 1.0 is installed, and streamchat wants ")


def test_it_loads_neither_transformers_nor_textual() -> None:
    report = Path("modules.txt")
    run("doctor", scenario={}, LOADED_MODULES=str(report))
    loaded = set(report.read_text().split())
    assert "torch" in loaded
    assert not loaded & {"transformers", "textual", "prompt_toolkit"}
