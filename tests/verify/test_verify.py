"""`streamchat verify`: green on what works, and each check fails on what it is for."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamchat.base.errors import ConfigError, ExitCode
from streamchat.benchmarks.pitfalls import run_pitfalls
from streamchat.cache.eviction.ledger import Ledger
from streamchat.cache.hook import StreamingHook
from streamchat.cache.layers import fronts
from streamchat.cache.layers.layer import StreamingLayer
from streamchat.cache.streaming import StreamingCache
from streamchat.cli import main as cli
from streamchat.verify.run import Verification, verify
from tests.support.real_engine import tiny_loaded
from tests.support.tiny import random_ids, tiny_model

pytestmark = pytest.mark.smoke

IDS = random_ids(200)[0].tolist()


@cache
def model_of(family: str) -> Any:
    return tiny_model(family)


def verified(family: str = "llama", **options: Any) -> Verification:
    return verify(model_of(family), IDS, **({"cache_size": 32, "new_tokens": 40} | options))


def failed(result: Verification) -> set[str]:
    return {check.name for check in result.checks if not check.ok}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "falcon_h1"])
def test_a_right_cache_passes_everything(family: str) -> None:
    result = verified(family)
    assert failed(result) == set()
    assert result.ok
    plain, manual, generate = result.runs
    assert [step.after for step in plain.steps] == [16 + i for i in range(40)]
    assert max(step.after for step in manual.steps) == 32
    assert [step.lengths for step in manual.steps] == [step.lengths for step in generate.steps]
    if family != "gpt2":
        assert manual.steps[-1].before == manual.steps[-1].after == 32
        assert manual.compressions == manual.tokens_evicted == 16 + 39 - 32


def test_what_is_left_of_hooks_and_shadowed_methods_is_nothing() -> None:
    verified()
    model = model_of("llama")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert "generate" not in vars(model)


LENGTHS = {f"{mode}: every layer has the length of the ledger" for mode in ("manual", "generate")}
MEMORY = {f"{mode}: memory is bounded, not only the visible length" for mode in ("manual", "generate")}
COUNTERS = {f"{mode}: the counters are correct" for mode in ("manual", "generate")}
LOGITS = "manual: logits equal those of re-rotating every key at every step"


def keeps_unmoved_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    original = fronts.write_fronts

    def unmoved(layers: list[StreamingLayer], prefix: int) -> None:
        base = layers[0].base
        for layer in layers:
            layer.base = 0
        original(layers, prefix)
        for layer in layers:
            layer.base = base

    monkeypatch.setattr(fronts, "write_fronts", unmoved)


def drops_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    def evict(self: StreamingCache, prefix: int, count: int) -> None:
        for layer in self.streaming_layers:
            layer.end -= count

    monkeypatch.setattr(StreamingCache, "_evict_from_layers", evict)


def forgets_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    original = StreamingLayer.__init__

    def roomy(layer: StreamingLayer, cache_size: int, *more: Any) -> None:
        original(layer, cache_size + 200, *more)

    def evict(self: StreamingCache, prefix: int, count: int) -> None:
        fronts.evict_slots(self.streaming_layers[::2], prefix, count)

    monkeypatch.setattr(StreamingLayer, "__init__", roomy)
    monkeypatch.setattr(StreamingCache, "_evict_from_layers", evict)
    monkeypatch.setattr(StreamingCache, "discard_partial_forward", lambda self: None)


def grows_its_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    original = StreamingCache._evict_from_layers

    def evict(self: StreamingCache, prefix: int, count: int) -> None:
        original(self, prefix, count)
        for layer in self.streaming_layers:
            layer.slots += count
            assert layer.storage is not None
            layer.storage.select(lambda buffer: torch.cat([buffer, buffer[:, :, :count]], dim=2))

    monkeypatch.setattr(StreamingCache, "_evict_from_layers", evict)


def counts_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Ledger.evict

    def evict(ledger: Ledger, prefix: int, count: int) -> Any:
        ledger.next_index += 1
        return original(ledger, prefix, count)

    monkeypatch.setattr(Ledger, "evict", evict)


def leaves_its_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    original = StreamingHook.remove
    monkeypatch.setattr(StreamingHook, "remove", lambda hook: original(hook) if hook.cache.cache_size != 16 else None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sabotage", "caught"),
    [
        (keeps_unmoved_sinks, {LOGITS}),
        (drops_the_newest, {LOGITS}),
        (forgets_one_layer, LENGTHS),
        (grows_its_storage, MEMORY),
        (counts_layers, COUNTERS),
        (leaves_its_hook, {"hooks are removed"}),
    ],
)
def test_what_is_broken_is_named(
    monkeypatch: pytest.MonkeyPatch, sabotage: Callable[[pytest.MonkeyPatch], None], caught: set[str]
) -> None:
    sabotage(monkeypatch)
    model = tiny_model("llama")
    result = verify(model, IDS, cache_size=32, new_tokens=40)
    assert caught <= failed(result)
    assert not result.ok


def test_logits_that_are_not_finite_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    original = StreamingCache._evict_from_layers

    def evict(self: StreamingCache, prefix: int, count: int) -> None:
        original(self, prefix, count)
        for layer in self.streaming_layers:
            assert isinstance(layer.values, Tensor)
            layer.values[..., -1, 0] = float("nan")

    monkeypatch.setattr(StreamingCache, "_evict_from_layers", evict)
    assert LOGITS in failed(verify(model, IDS, cache_size=32, new_tokens=40))


def test_the_classic_mistakes_side_by_side() -> None:
    dense, post_hook, cut, streaming = run_pitfalls(model_of("llama"), IDS, verified())
    assert (dense.counter, dense.length) == (0, 199)
    assert post_hook.counter > 10
    assert post_hook.length == 199
    assert post_hook.storage_bytes == dense.storage_bytes
    assert post_hook.perplexity == dense.perplexity
    assert cut.counter > 10
    assert cut.length == 32
    assert cut.storage_bytes < dense.storage_bytes / 3
    assert streaming.length == 32
    assert streaming.perplexity != pytest.approx(cut.perplexity, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"new_tokens": 5}, "5 new tokens after a prompt of 16 do not fill cache_size = 32"),
        ({"cache_size": 1024, "new_tokens": None}, "the prompt has 200 tokens; it must have at least 512"),
    ],
)
def test_sizes_that_prove_nothing_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        verified(**options)


# --- the command -----------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamchat.models.load.load_model", lambda *args, **kwargs: tiny_loaded())


@pytest.mark.usefixtures("tiny_here")
def test_the_command_prints_tables_checks_and_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--cache-size", "32", "--show-pitfalls"]) == ExitCode.OK
    out, err = capsys.readouterr()
    assert err == ""
    assert "tiny, float32 on cpu, sdpa attention" in out
    assert out.count("3 layers x 32") > 4
    assert "keys cut, positions left alone" in out
    assert out.endswith("All 13 checks passed.\n")
    assert max(len(line) for line in out.splitlines()) <= 100


@pytest.mark.usefixtures("tiny_here")
def test_the_command_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["verify", "--cache-size", "32", "--json", "--out", str(tmp_path / "out")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "out" / "verify.json").read_text()) == report
    assert "All 13 checks passed." in (tmp_path / "out" / "verify.html").read_text()
    assert report["ok"] is True
    assert report["model"]["name"] == "tiny"
    assert report["modes"]["manual"]["steps"][-1]["layers"] == [32, 32, 32]
    assert all(check["ok"] for check in report["checks"])


@pytest.mark.usefixtures("tiny_here")
def test_a_failed_check_is_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    keeps_unmoved_sinks(monkeypatch)
    assert cli.main(["verify", "--cache-size", "32"]) == ExitCode.CHECK_FAILED.value == 4
    out = capsys.readouterr().out
    assert f"FAIL   {LOGITS}" in out
    assert out.endswith("1 of 13 checks failed.\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--cache-size", "8"], "--cache-size: cache_size = 8 is not valid; it must be at least 16"),
        (["--cache-size", "16", "--num-sink-tokens", "8"], "num_sink_tokens = 8 is too large for --cache-size 16"),
        (["--new-tokens", "0"], "--new-tokens 0 must be at least 1"),
        (["--cache-size", "many"], "--cache-size: cache_size must be a whole number, at least 16, not 'many'"),
    ],
)
def test_wrong_flags_are_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", *arguments]) == ExitCode.USAGE
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("default_model_home")
def test_the_default_model_is_verified_and_shows_the_pitfalls() -> None:
    from streamchat.models.load import load_model
    from streamchat.verify.text import help_topic_ids

    loaded = load_model("default", dtype="float32")
    ids = help_topic_ids(loaded.tokenizer, 256)
    result = verify(loaded.model, ids, cache_size=64, new_tokens=48)
    assert failed(result) == set()
    dense, post_hook, cut, streaming = run_pitfalls(loaded.model, ids, result)
    assert post_hook.length == dense.length == 255
    assert cut.length == streaming.length == 64
    # measured: 12.1 dense, 13.1 streaming, 155 cut without moving positions
    assert streaming.perplexity < 1.3 * dense.perplexity
    assert cut.perplexity > 4 * dense.perplexity
