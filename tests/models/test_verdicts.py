"""The remembered verdict of the self-check, and the remembered fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from streamchat.base.atomic_files import read_checked, save_checked
from streamchat.base.errors import UnsupportedModelError
from streamchat.cache.positions import strategy
from streamchat.cache.positions.fit import PositionFit, fit_positions
from streamchat.cache.positions.selfcheck import require_self_check
from streamchat.models import checked_fit
from streamchat.models.checked_fit import choose_checked_fit, verdict_file
from tests.support.families import FAMILIES, build
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


# --- the fit -------------------------------------------------------------------------------------------------------


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models whose fit was measured."""
    measured: list[Any] = []
    original = fit_positions

    def counting(model: Any) -> Any:
        measured.append(model)
        return original(model)

    monkeypatch.setattr(strategy, "fit_positions", counting)
    return measured


def angles_of(fit: PositionFit) -> list[Any]:
    """Everything that a fit does, as plain numbers."""

    def each(rotation: Any) -> Any:
        if rotation is None:
            return None
        cos, sin = rotation.source.angles(torch.tensor([0, 3, 40]))
        return cos.tolist(), sin.tolist(), rotation.offset, rotation.interleaved, rotation.reverse

    layers = [(each(layer.keys), each(layer.values)) for layer in fit.layers]
    return [layers, fit.devices, fit.position_limit, fit.error, fit.method, fit.single_steps, fit.scales_queries]


@pytest.mark.parametrize(
    "name", ["llama", "gpt_neox", "gptj", "falcon_new", "gemma3_window_16", "llama_dynamic", "bloom", "mpt"]
)
def test_the_fit_of_the_same_weights_is_measured_once(forwards: list[Any], name: str) -> None:
    model = build(name, "sdpa" if FAMILIES[name].sdpa else "eager")
    first, second = choose_checked_fit(model), choose_checked_fit(model)
    assert len(forwards) == 1
    assert angles_of(first) == angles_of(second)
    sources = [{id(layer.keys.source) for layer in fit.layers if layer.keys} for fit in (first, second)]
    assert len(sources[0]) == len(sources[1])  # layers share the angles


def test_the_fit_of_other_weights_is_measured(forwards: list[Any]) -> None:
    choose_checked_fit(tiny_model("llama"))
    choose_checked_fit(tiny_model("llama", seed=3))
    assert len(forwards) == 2


def test_a_fit_that_recomputes_is_not_remembered(forwards: list[Any]) -> None:
    model = build("gpt2")
    assert choose_checked_fit(model).method == choose_checked_fit(model).method == "recompute"
    assert len(forwards) == 2


CHANGES: list[Any] = [
    {},
    None,
    {"layers": []},
    {"method": "recompute"},
    {"layers": [[[7, 0, False, False], None]]},
    {"sources": [{"module": "no.such", "args": [], "options": {}}]},
    {"sources": [{"module": "model.rotary_emb", "args": [], "options": {}}]},
    {"position_limit": "x"},
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_damaged_fit_is_measured_again(forwards: list[Any], change: dict[str, Any] | None) -> None:
    model = tiny_model("llama")
    expected = angles_of(choose_checked_fit(model))
    file = checked_fit._fit_file(model)
    kept = read_checked(file)
    assert kept["layers"]
    save_checked(file, {**kept, **change} if change else change, "a test")
    assert angles_of(choose_checked_fit(model)) == expected
    assert len(forwards) == 2


def test_a_changed_byte_of_a_fit_is_noticed(forwards: list[Any]) -> None:
    model = tiny_model("llama")
    expected = angles_of(choose_checked_fit(model))
    file = checked_fit._fit_file(model)
    assert "false" in file.read_text()
    file.write_text(file.read_text().replace("false", "true", 1))  # a rotation of other pairs
    assert angles_of(choose_checked_fit(model)) == expected
    assert len(forwards) == 2
