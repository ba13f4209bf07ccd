"""The setting `kernels` reaches every command, and belongs to a model: two of them in one process keep their own."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamchat.base import events as ev
from streamchat.base import paths
from streamchat.base.requests import SwitchModel
from streamchat.cli import main as cli
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.conversation.assemble import load_from_settings
from streamchat.decode import install as short
from streamchat.decode.install import install
from streamchat.decode.native_step import CompiledStep
from streamchat.engine.engine import Engine
from streamchat.kernels import library
from streamchat.kernels.library import Kernels, load_kernels, why_unavailable
from streamchat.models.load import LoadedModel, load_model
from streamchat.quantization.linear import quantized_layers
from streamchat.quantization.replace import groups, quantize_group, replace
from streamchat.quantization.weights import quantize
from tests.support.decode_models import cache_of, make, stream
from tests.support.families import text
from tests.support.kernels import quick_compiler
from tests.support.models_help import save, tiny_llama
from tests.support.real_engine import Watched

pytestmark = pytest.mark.skipif(load_kernels("auto") is None, reason=why_unavailable("auto"))

WORDS = "The miller had a mill by the river and a cat. " * 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(WORDS)
    return save(tiny_llama(hidden_size=64, max_position_embeddings=1024), tmp_path / "model")


class Spy:
    """Counts the loads of the compiled library, and the programs that it runs."""

    def __init__(self) -> None:
        self.loads = self.runs = 0
        self.real = load_kernels("auto")

    def loaded(self) -> tuple[Any, str]:
        self.loads += 1
        spied: Any = object.__new__(Kernels)  # a copy would be the one that `load_kernels` returns, which asks for this
        spied.__dict__.update(vars(self.real))
        spied.run = self.run
        return spied, ""

    def run(self, *arguments: Any) -> None:
        assert self.real is not None
        self.runs += 1
        self.real.run(*arguments)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    found = Spy()
    monkeypatch.setattr(library, "_loaded", found.loaded)
    return found


MODEL = ("--model", "model", "--device", "cpu")
SMALL = ("--max-new-tokens", "4", "--cache-size", "64")
COMMANDS = {
    "verify": ["verify", *MODEL, "--cache-size", "32"],
    "ppl": ["ppl", *MODEL, "a.txt", "--policies", "sinks", "--cache-size", "32", "--chunk", "1", "--max-tokens", "80"],
    "bench": ["bench", *MODEL, "--cache-size", "32", "--turns", "3", "--methods", "streamchat"],
    "bench --decode": ["bench", "--decode", *MODEL, "--dtype", "float32", "--cache-size", "64", "--rounds", "1"],
    "bench --resume": ["bench", "--resume", *MODEL, "--cache-size", "64", "--rounds", "1"],
    "replay": ["replay", "a.txt", "--out", "run", "--max-turns", "1", *MODEL, *SMALL],
    "pipe": ["--plain", *MODEL, *SMALL],
}


@pytest.mark.parametrize("choice", ["auto", "torch"])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_obeys_the_flag(
    name: str, choice: str, folder: Path, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))
    code = cli.main([*COMMANDS[name], "--kernels", choice])
    assert code == 0
    assert (spy.loads > 0, spy.runs > 0) == ((True, True) if choice == "auto" else (False, False))


@pytest.mark.parametrize("choice", ["auto", "torch"])
def test_a_command_obeys_the_file_of_settings(choice: str, folder: Path, spy: Spy) -> None:
    config = paths.config_dir() / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text(f'[streamchat]\n[model]\nkernels = "{choice}"\n')
    assert cli.main(COMMANDS["verify"]) == 0
    assert (spy.runs > 0) == (choice == "auto")


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["auto", "torch"])
def test_worker_processes_of_a_sweep_obey_too(
    choice: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker would compile kernels into this test's own empty cache folder."""
    monkeypatch.setenv("CC", quick_compiler(tmp_path))
    code = cli.main(
        ["sweep", *MODEL, "a.txt", "--cache-sizes", "32", "--sinks", "4", "--max-tokens", "60", "--chunk", "1",
         "--workers", "1", "--out", "out", "--kernels", choice]
    )  # fmt: skip
    assert code == 0
    assert bool(list(paths.cache_dir().glob("kernels/*.so"))) == (choice == "auto")


@pytest.mark.parametrize("choice", ["auto", "torch"])
def test_doctor_names_the_choice(choice: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["doctor", "--kernels", choice])
    assert ("PyTorch: kernels = torch (--kernels)" in capsys.readouterr().out) == (choice == "torch")


@pytest.mark.parametrize("choice", ["auto", "torch"])
def test_another_model_is_loaded_with_the_same_choice(choice: Any, folder: Path, spy: Spy) -> None:
    settings = Settings(model="model", device="cpu", kernels=choice, cache_size=64, max_new_tokens=4)
    loads: list[LoadedModel] = []

    def load(configuration: Configuration, progress: Any) -> LoadedModel:
        loads.append(load_from_settings(configuration, progress))
        return loads[-1]

    engine = Engine(Configuration(settings, {}, None), load)
    watched = Watched(engine)
    engine.start()
    try:
        watched.wait(ev.ModelReady)
        engine.send(SwitchModel(str(folder)))
        watched.wait(ev.ModelReady, 2)
        watched.turn("hello")
    finally:
        assert engine.close(30)
    assert [loaded.kernels is not None for loaded in loads] == [choice == "auto"] * 2
    assert (spy.runs > 0) == (choice == "auto")


def logits(loaded: LoadedModel) -> Tensor:
    ids = torch.arange(5, 45)[None]
    return stream(loaded.model, cache_of(loaded.model, 32), ids, 8)


@pytest.mark.parametrize("weights", ["native", "int8", "int4"])
def test_two_models_in_one_process_keep_their_own(weights: str, folder: Path, spy: Spy) -> None:
    def load(choice: str) -> LoadedModel:
        return load_model(str(folder), device="cpu", dtype="bfloat16", weights=weights, kernels=choice)

    compiled = load("auto")
    assert isinstance(compiled.model.forward.step, CompiledStep)  # type: ignore[attr-defined]
    expected = logits(compiled)
    plain = load("torch")
    assert torch.equal(logits(compiled), expected)
    before = spy.runs
    other = logits(plain)
    assert spy.runs == before
    assert not torch.equal(other, expected)  # other roundings: they are other kernels
    again = load("auto")
    assert torch.equal(logits(again), expected)
    assert torch.equal(logits(plain), other)
    # a copy shares the library, and multiplies with the same kernels
    layers, copies = quantized_layers(compiled.model), quantized_layers(copy.deepcopy(compiled.model))
    assert bool(layers) == (weights != "native")
    for name, layer in layers.items():
        assert copies[name].quantized.kernels is layer.quantized.kernels is not None


def test_a_part_of_a_matrix_is_multiplied_by_the_kernels_of_the_whole() -> None:
    weight = torch.randn(192, 64, generator=torch.Generator().manual_seed(1))
    for kernels in (None, load_kernels("auto")):
        whole = quantize(weight, "int4", kernels)
        assert whole.tiled == (kernels is not None)
        assert whole.part(64, 128).kernels is whole.kernels is kernels


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_model_that_they_do_not_serve_still_multiplies_weights_that_were_quantized_for_them(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, kernels = make("llama").to(torch.bfloat16), text(40), load_kernels("auto")
    monkeypatch.setattr(short, "kernels_support", lambda spec: False)
    replace(model, {group: quantize_group(model, group, its, kernels) for group, its in groups(model, kind).items()})
    expected = stream(model, cache_of(model, 48), ids, 20).float()
    assert install(model, kernels)
    assert not isinstance(model.forward.step, CompiledStep)
    found = stream(model, cache_of(model, 48), ids, 20).float()
    assert (found - expected).square().mean().sqrt() / expected.std() < 0.05
