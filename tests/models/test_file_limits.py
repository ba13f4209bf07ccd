"""No more files may be opened: that is said, and not that the files of the model are damaged."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from streamchat.base.errors import LimitError, refuse
from streamchat.models import adapters, folder, load, read
from streamchat.models.gguf import file as gguf
from streamchat.models.gguf import reader  # noqa: F401 - imported before the limit is set
from tests.support.models_help import save, tiny_llama


@contextmanager
def no_more_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as last:
        resource.setrlimit(resource.RLIMIT_NOFILE, (last.fileno() + 1, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_reading_a_model_s_files_names_the_limit(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["X"]}))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")

    def read_any() -> None:
        with refuse("it cannot be read", "choose another"):
            (tmp_path / "config.json").read_bytes()

    steps: list[Any] = [
        lambda: folder.read_config(tmp_path),
        lambda: folder.shard_names(tmp_path / "model.safetensors.index.json"),
        lambda: folder.tensor_shapes(tmp_path / "model.safetensors"),
        lambda: adapters.find_adapters(str(tmp_path)),
        lambda: gguf.open_gguf(tmp_path / "a.gguf"),
        read_any,
    ]
    for step in steps:
        with no_more_files(), pytest.raises(LimitError, match="ulimit -n"):
            step()


@pytest.mark.parametrize("library", ["AutoTokenizer", "_read_exactly"])
def test_loading_a_model_names_the_limit(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any, **named: Any) -> Any:
        raise OSError("unable to open file <a> in read-only mode: Too many open files (24)")

    failing = type("Library", (), {"from_pretrained": fail}) if library == "AutoTokenizer" else fail
    monkeypatch.setattr(read, library, failing)
    with pytest.raises(LimitError, match="ulimit -n"):
        load.load_model(str(save(tiny_llama(), tmp_path)), device="cpu", kernels="off")
