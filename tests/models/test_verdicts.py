"""The remembered verdict of the self-check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from streamchat.base.errors import UnsupportedModelError
from streamchat.cache.positions import strategy
from streamchat.cache.positions.selfcheck import require_self_check
from streamchat.models import checked_fit
from streamchat.models.checked_fit import choose_checked_fit, verdict_file
from tests.support.tiny import tiny_model


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that were checked."""
    checked: list[Any] = []
    original = require_self_check

    def counting(model: Any, fit: Any) -> Any:
        checked.append(model)
        return original(model, fit)

    monkeypatch.setattr(strategy, "require_self_check", counting)
    return checked


def test_a_model_is_checked_once(checks: list[Any]) -> None:
    model = tiny_model("llama")
    first, second = choose_checked_fit(model), choose_checked_fit(model)
    assert len(checks) == 1
    assert first.method == second.method == "rotation"
    assert choose_checked_fit(tiny_model("llama", seed=3)).method == "rotation"
    assert len(checks) == 1  # other weights, the same computation


def test_any_other_condition_is_checked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    files = {verdict_file(model), verdict_file(tiny_model("llama", "eager"))}
    files.add(verdict_file(tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 20000.0})))
    files.add(verdict_file(tiny_model("llama").to(torch.bfloat16)))
    monkeypatch.setattr(checked_fit, "code_digest", lambda package: "other code")
    files.add(verdict_file(model))
    monkeypatch.setattr(torch, "__version__", "0.0.0")
    files.add(verdict_file(model))
    assert len(files) == 6


def test_a_failed_check_is_not_remembered(checks: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")

    def failing(model: Any, fit: Any) -> None:
        raise UnsupportedModelError("wrong")

    monkeypatch.setattr(strategy, "require_self_check", failing)
    assert choose_checked_fit(model).method == "recompute"
    assert not verdict_file(model).exists()
    monkeypatch.undo()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"passed": 1}', "\0"])
def test_a_damaged_memory_only_costs_the_check(checks: list[Any], text: str) -> None:
    model = tiny_model("llama")
    file = verdict_file(model)
    file.parent.mkdir(parents=True)
    file.write_text(text)
    choose_checked_fit(model)
    assert len(checks) == 1
    choose_checked_fit(model)
    assert len(checks) == 1


def test_a_folder_that_cannot_be_written_only_costs_the_check(checks: list[Any], tmp_path: Path) -> None:
    model = tiny_model("llama")
    file = verdict_file(model)
    file.parent.parent.mkdir(parents=True, exist_ok=True)
    file.parent.write_text("a file where the folder should be")
    assert choose_checked_fit(model).method == choose_checked_fit(model).method == "rotation"
    assert len(checks) == 2
