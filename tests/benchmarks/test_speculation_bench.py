"""`streamchat bench --speculative`: replies alternate between both modes, and the page says what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from streamchat.base.errors import ExitCode
from streamchat.benchmarks import speculation
from streamchat.cli import main as cli
from streamchat.conversation.conversation import Conversation
from streamchat.conversation.ends import EndWatch
from tests.support.kernels import needs_kernels
from tests.support.models_help import save, tiny_llama

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tiny_llama(**SIZES, max_position_embeddings=2048), tmp_path / "llama")


def bench(folder: Path, *arguments: str) -> int:
    given = ["--model", str(folder), "--dtype", "float32", "--cache-size", "256", "--rounds", "2", *arguments]
    return cli.main(["bench", "--speculative", *given])


@needs_kernels
def test_both_modes_get_the_same_messages_in_turn(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculation, "REPLY_TOKENS", 24)
    turns: list[tuple[str, str, float, int]] = []
    run_turn = Conversation.run_turn

    def noted(self: Conversation, text: str, *rest: Any) -> Any:
        outcome = run_turn(self, text, *rest)
        turns.append((self.settings.speculation, text, self.settings.temperature, outcome.new_tokens))
        return outcome

    monkeypatch.setattr(Conversation, "run_turn", noted)
    threads = torch.get_num_threads()
    assert bench(folder, "--json", "--threads", "1", "--cpu-time") == ExitCode.OK
    assert torch.get_num_threads() == threads
    *lines, last = capsys.readouterr().out.splitlines()
    assert any("CPU time" in line for line in lines)
    figures = json.loads(last)["figures"]
    assert [(each["text"], each["temperature"]) for each in figures] == [
        *(("text that repeats", 0.0), ("prose", 0.0), ("text that repeats", 0.7), ("prose", 0.7))
    ]
    for each in figures:
        mine = [turn for turn in turns if turn[1] in speculation.TEXTS[each["text"]] and turn[2] == each["temperature"]]
        modes = [mode for mode, *_ in mine]
        assert [text for _, text, *_ in mine[::2]] == [text for _, text, *_ in mine[1::2]]
        assert set(zip(modes[::2], modes[1::2], strict=True)) == {("off", "auto"), ("auto", "off")}
        assert each["tokens"] == sum(tokens for mode, *_, tokens in mine if mode == "auto")
        assert each["same_replies"] == each["replies"] == 8
        assert each["speedup"] == pytest.approx(each["tps"] / each["plain_tps"])
        assert 0 <= each["accepted"] <= each["proposed"]


@needs_kernels
def test_replies_without_a_token_are_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EndWatch, "ended_by", lambda self, token: True)
    assert bench(folder) == ExitCode.FAILURE
    err = capsys.readouterr().err
    assert "llama ended all replies to text that repeats before their first token; try another --model" in err
    assert "unexpected" not in err


def test_a_model_without_compiled_kernels_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(folder, "--kernels", "torch") == ExitCode.USAGE
    err = capsys.readouterr().err
    assert "speculation needs compiled kernels that serve all of llama" in err
    assert "Traceback" not in err


def test_other_devices_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--speculative", "--device", "cuda"]) == ExitCode.USAGE
    assert "--speculative measures the CPU and device = cuda; add --device cpu" in capsys.readouterr().err
