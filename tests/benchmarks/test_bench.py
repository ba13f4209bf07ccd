"""`streamchat bench` side by side: what each way really does, what is counted, and what is shown."""

from __future__ import annotations

import argparse
import json
import sys
import time
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Type

from streamchat.base.errors import ExitCode
from streamchat.base.progress import silent
from streamchat.benchmarks import compare
from streamchat.benchmarks.chat_text import make_turns
from streamchat.benchmarks.compare_page import make_page
from streamchat.benchmarks.methods import llama_cpp as peers
from streamchat.benchmarks.methods.registry import make_method
from streamchat.benchmarks.methods.stream import ModelStream, Stream, open_stream
from streamchat.benchmarks.methods.streaming import Chat
from streamchat.benchmarks.workloads import ChatFigures, DecodeFigures, Turn, measure_chat, measure_decode
from streamchat.cache.positions.fit import fit_positions
from streamchat.cache.positions.strategy import choose_fit
from streamchat.cache.streaming import StreamingCache
from streamchat.cli import main as cli
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.models.load import load_from_settings
from streamchat.quantization.linear import MAX_ROWS, quantized_layers
from streamchat.quantization.matrix import QuantizedMatrix
from streamchat.quantization.replace import groups, quantize_group, replace
from streamchat.reports.page import as_text
from tests.support.fake_llama import FakeLlama
from tests.support.gguf_models import FAMILIES, write_family
from tests.support.kernels import needs_kernels
from tests.support.real_engine import tiny_loaded
from tests.support.tiny import random_ids, tiny_model
from tests.support.toy_tokenizer import toy_tokenizer

BUDGET = 48
IDS = random_ids(400)[0].tolist()
NAMES = ["streamchat", "dense", "re-read", "recompute", "no-rerotation"]


@cache
def model_of(family: str) -> tuple[Any, Any]:
    model = tiny_model(family)
    return model, choose_fit(model)


def methods(family: str = "llama") -> dict[str, ModelStream]:
    model, fit = model_of(family)
    return {name: open_stream(make_method(name, BUDGET, 4), model, fit) for name in NAMES}


@contextmanager
def fed_tokens(family: str) -> Iterator[list[int]]:
    """Tokens of each forward of the model."""
    fed: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        fed.append(kwargs["input_ids"].shape[1])

    handle = model_of(family)[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield fed
    finally:
        handle.remove()


@pytest.mark.smoke
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_all_ways_write_the_same_as_long_as_nothing_leaves(family: str) -> None:
    written = {}
    for name, method in methods(family).items():
        method.start()
        token, out = method.prefill(IDS[:20]), []
        for _ in range(6):
            out.append(token)
            token = method.decode_step(token)
        method.append(IDS[20:26])
        out.append(method.prefill(IDS[26:30]))
        written[name] = out
        method.close()
    assert list(written) == NAMES
    assert all(out == written["dense"] for out in written.values())


@pytest.mark.parametrize("name", NAMES)
def test_writing_times_each_token(name: str) -> None:
    method = methods()[name]
    method.start()
    token = method.prefill(IDS[:20])
    with fed_tokens("llama") as fed:
        times = method.decode_timed(token, 5)
    method.close()
    assert len(times) == len(fed) == 5
    assert min(times) > 0
    assert fed == ([21, 22, 23, 24, 25] if name == "recompute" else [1] * 5)


def test_what_is_read_at_a_turn() -> None:
    fed_by = {}
    for name, method in methods().items():
        method.start()
        method.append(IDS[:200])
        with fed_tokens("llama") as fed:
            method.prefill(IDS[200:210])
        fed_by[name] = sum(fed)
        method.close()
    assert fed_by == {"streamchat": 10, "dense": 10, "re-read": 210, "recompute": BUDGET, "no-rerotation": 10}


def test_only_ours_and_the_cut_stay_in_the_budget() -> None:
    for name, method in methods().items():
        method.start()
        method.prefill(IDS[:40])
        early = method.kv_bytes
        method.append(IDS[40:])
        held = method.kv_bytes
        method.close()
        if name == "dense":
            assert held == early * 10
        elif name == "streamchat":
            assert held == early
        elif name == "no-rerotation":
            assert held == early * BUDGET / 40


def test_others_have_the_model_s_own_weights() -> None:
    model = tiny_model("llama")
    fit = choose_fit(model)
    plain = [open_stream(make_method(name, BUDGET, 4), model, fit, native_weights=True) for name in NAMES[1:]]
    written = []
    for packed in (False, True):
        if packed:
            names = groups(model, "int8")
            replace(model, {group: quantize_group(model, group, "int8", None) for group in names})
        for method in plain:
            method.start()
            token = method.prefill(IDS[:20])
            written.append((method.name, packed, token, method.decode_step(token)))
            rows = {layer.max_rows for layer in quantized_layers(model).values()}
            assert rows == ({0} if packed else set())
            method.close()
    assert len({(token, following) for _, _, token, following in written}) == 1
    assert {layer.max_rows for layer in quantized_layers(model).values()} == {MAX_ROWS}


@needs_kernels
def test_others_have_native_weights_if_the_model_has_only_codes(tmp_path: Path) -> None:
    write_family(tmp_path / "a.gguf", FAMILIES["llama"], lambda name: Type.Q4_1)
    settings = Settings(model=str(tmp_path / "a.gguf"), device="cpu", dtype="bfloat16")
    loaded, configuration = load_from_settings(settings), Configuration(settings)
    assert loaded.weights == "int4"
    asked = argparse.Namespace(float32=False, peers=False)
    streams, _ = compare._streams(
        asked, configuration, loaded, BUDGET, ["streamchat", "dense", "no-rerotation"], silent
    )
    models = [stream.model for stream in streams if isinstance(stream, ModelStream)]
    assert models[0] is loaded.model
    assert models[1] is models[2]
    assert not any(isinstance(weight, QuantizedMatrix) for weight in models[1].parameters())
    for stream in streams:
        with stream:
            stream.start()
            assert stream.prefill(IDS[:20]) >= 0
    only_ours, _ = compare._streams(asked, configuration, loaded, BUDGET, ["streamchat"], silent)
    assert len(only_ours) == 1


def test_nothing_stays_on_the_model() -> None:
    for method in methods().values():
        method.start()
        method.prefill(IDS[:60])
        method.close()
        method.close()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model_of("llama")[0].modules())


# --- workloads ----------------------------------------------------------------------------------------------------


class Fake(Stream):
    """Takes as long as it is told, on a clock of its own."""

    description = "a fake"

    def __init__(self, name: str, clock: list[float], per_token: float, rereads: bool = False) -> None:
        self.name, self._clock, self._per_token, self._rereads = name, clock, per_token, rereads
        self.calls: list[str] = []

    def start(self) -> None:
        self.calls.append("start")
        self._held = 0

    def prefill(self, ids: Sequence[int], reserve: int = 0) -> int:
        self._held += len(ids)
        self._clock[0] += self._per_token * (self._held if self._rereads else len(ids))
        return 0

    def append(self, ids: Sequence[int], reserve: int = 0) -> None:
        self._held += len(ids)

    @property
    def kv_bytes(self) -> int:
        return self._held


class Broken(Fake):
    def decode_step(self, token: int) -> int:
        raise RuntimeError("no kernel\nfor this")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr("streamchat.benchmarks.methods.stream.time.perf_counter", lambda: now[0])
    return now


@pytest.mark.slow
def test_rounds_run_every_way_in_turn_and_the_first_warms_up(clock: list[float]) -> None:
    said: list[str] = []
    ways = [Fake("a", clock, 0.001), Fake("b", clock, 0.002), Broken("c", clock, 0.001)]
    found = measure_decode(ways, IDS, 100, 4, 2, said.append)
    order = [line.split(": ")[1] for line in said]
    assert order == ["a", "b", "c", "a", "b", "a", "b"]
    assert [len(found[name].early_ms) for name in "abc"] == [2, 2, 0]
    assert found["a"].early_ms == pytest.approx([1.0, 1.0])
    assert found["b"].late_ms == pytest.approx([2.0, 2.0])
    assert found["b"].prefill_tps == pytest.approx([500.0, 500.0])
    assert found["a"].kv_bytes == 400 + 2 * 5
    assert found["c"].failure == "RuntimeError: no kernel for this"


def test_the_first_token_is_timed_at_the_turns_asked_for(clock: list[float]) -> None:
    turns = [Turn([1] * 10, [2] * 30)] * 103
    flat, growing = Fake("flat", clock, 0.001), Fake("growing", clock, 0.001, rereads=True)
    found = measure_chat([flat, growing], turns, [5, 20, 100], 3, 100.0, lambda words: None)
    assert found["flat"].history == {5: 160, 20: 760, 100: 3960}
    for times in found["flat"].seconds.values():
        assert times == pytest.approx([0.01] * 3)
    assert found["growing"].seconds[5] == pytest.approx([0.17, 0.21, 0.25])
    assert found["growing"].seconds[100] == pytest.approx([3.97, 4.01, 4.05])
    assert found["growing"].unreached == {}
    limited = measure_chat([flat, growing], turns, [5, 20, 100], 3, 2.0, lambda words: None)
    assert set(limited["flat"].seconds) == {5, 20, 100}
    assert set(limited["growing"].seconds) == {5, 20}
    assert limited["growing"].skipped[100] == pytest.approx(4.0, rel=0.5)


def test_a_history_that_takes_too_long_to_be_read_is_given_up(clock: list[float]) -> None:
    class Slow(Fake):
        def append(self, ids: Sequence[int], reserve: int = 0) -> None:
            self._clock[0] += 0.1

    turns = [Turn([1] * 10, [2] * 30)] * 103
    found = measure_chat([Slow("slow", clock, 0.001)], turns, [5, 100], 3, 1.0, lambda words: None)["slow"]
    assert set(found.seconds) == {5}
    # 0.1 s a turn from turn 8 on, 6 s in all
    assert found.unreached == {100: 68}
    page = make_page([], {}, {"slow": found}, [], [], {"cache_size": 64})
    assert "slow timed out before turn 100: history processed only up to turn 68" in as_text(page, 100)


def test_turns_are_those_of_a_chat() -> None:
    tokenizer = toy_tokenizer()
    turns = make_turns(tokenizer, 40, 12)
    texts = [tokenizer.decode(turn.prompt) for turn in turns]
    assert texts[0].startswith("<|im_start|>system")
    assert all(text.startswith("<|im_start|>user\n") for text in texts[1:])
    assert all(text.endswith("<|im_start|>assistant\n") for text in texts)
    closing = tokenizer("<|im_end|>\n", add_special_tokens=False)["input_ids"]
    assert all(len(turn.reply) == 12 + len(closing) and turn.reply[12:] == closing for turn in turns)
    assert turns[1].reply != turns[2].reply


def test_the_time_of_evictions_is_told(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_loaded()
    ours = Chat(make_method("streamchat", 64, 4), loaded.model, fit_positions(loaded.model))
    evict = StreamingCache._evict_from_layers

    def slow(cache: StreamingCache, prefix: int, count: int) -> None:
        clock[0] += 0.15
        evict(cache, prefix, count)

    prefill = ours.prefill

    def slow_prefill(ids: Sequence[int], reserve: int = 0) -> int:
        clock[0] += 1.0
        return prefill(ids, reserve)

    monkeypatch.setattr(ours, "prefill", slow_prefill)
    monkeypatch.setattr(StreamingCache, "_evict_from_layers", slow)
    found = measure_decode([ours], [3 + i % 50 for i in range(256)], 64, 44, 1, lambda words: None)["streamchat"]
    # 45 tokens in blocks of 15, a quarter of what can leave
    assert found.evicting_ms == pytest.approx([1000 * 0.15 / 15])
    assert Fake("a", clock, 0.001).evicting_s is None


# --- the page -----------------------------------------------------------------------------------------------------


def test_ratios_are_of_pairs_of_rounds() -> None:
    ours = DecodeFigures([100.0, 120.0, 110.0], [10.0, 20.0, 10.0], [10.0, 20.0, 10.0], [0.1, 0.1, 0.3])
    theirs = DecodeFigures([100.0, 120.0, 110.0], [10.0, 20.0, 10.0], [30.0, 60.0, 40.0])
    broken = DecodeFigures(failure="RuntimeError: no kernel")
    slow = ChatFigures({5: [1.0, 3.0, 2.0]}, {5: 10}, {5: 100, 500: 9000}, {500: 90.0})
    quick = ChatFigures({5: [0.1, 0.3, 0.1], 500: [0.2]}, {5: 10, 500: 20}, {5: 100, 500: 9000})
    page = make_page(
        [],
        {"streamchat": ours, "generate": theirs, "x": broken},
        {"streamchat": quick, "re-read": slow},
        ["about"],
        ["a note"],
        {"cache_size": 64},
    )
    assert page.data["decode"]["generate"]["time_to_ours"] == 3.0
    assert page.data["decode"]["generate"]["late_to_early"] == 3.0
    assert page.data["decode"]["streamchat"]["time_to_ours"] == 1.0
    assert page.data["chat"]["re-read"]["time_to_ours"] == {5: 10.0}
    text = as_text(page, 100)
    assert "40.0 (30.0-60.0)" in text
    assert "3.00 x" in text
    assert "1.0 %" in text
    assert "RuntimeError: no kernel" in text
    assert "re-read was not measured at turn 500: it would have taken about 1 min 30 s per turn; raise --limit." in text
    assert [picture.name for picture in page.pictures] == ["decode", "first-token"]


@pytest.mark.slow
def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr("streamchat.benchmarks.compare.load_from_settings", lambda *_, **changes: tiny_loaded())
    sizes = ["--cache-size", "64", "--rounds", "1", "--new-tokens", "3", "--turns", "2,6"]
    monkeypatch.setattr("streamchat.benchmarks.compare.REPLY_TOKENS", 8)
    assert cli.main(["bench", *sizes, "--out", str(tmp_path / "out"), "--charts", "--json"]) == ExitCode.OK
    text, last = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    data = json.loads(last)
    assert list(data["decode"]) == ["streamchat", "dense", "recompute", "no-rerotation"]
    assert list(data["chat"]) == NAMES
    assert not any(each["failure"] for part in ("decode", "chat") for each in data[part].values())
    assert data["decode"]["streamchat"]["time_to_ours"] == 1.0
    assert set(data["chat"]["streamchat"]["first_token_ms"]) == {"2", "6"}
    assert "Endless text" in text
    assert "Time to first token" in text
    assert {"bench.json", "bench.html", "decode.svg", "first-token.png"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert cli.main(["bench", *sizes, "--methods", "cut,streamchat", "--workloads", "decode"]) == ExitCode.OK
    out = capsys.readouterr().out
    assert "recompute" not in out
    assert "Time to first token" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "cut,fast"], "fast is not a method; choose from dense, window, sinks"),
        (["--workloads", ","], "--workloads is empty; give a comma-separated list"),
        (["--turns", "0,5"], "--turns: 0 is not a turn number (turns count from 1)"),
        (["--turns", "5,6"], "--turns: 5 and the next one must be at least 3 turns apart"),
        (["--new-tokens", "1"], "--new-tokens 1 must be at least 2"),
        (["--limit", "0"], "--limit 0.0 must be above 0"),
        (["--limit", "nan"], "--limit nan must be above 0"),
        (["--rounds", "0"], "--rounds 0 must be at least 1"),
        (["--turns", "9" * 5000], "is not a turn number (turns count from 1)"),
        (
            ["--decode", "--methods", "dense"],
            "--methods belongs to the comparison of methods; leave it or --decode out",
        ),
        (["--ui", "--turns", "3"], "--turns belongs to the comparison"),
        (["--startup", "--peers"], "--peers belongs to the comparison"),
        (["--max-new-tokens", "9"], "--max-new-tokens needs --ui"),
    ],
)
def test_wrong_input(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert cli.main(["bench", *arguments]) == ExitCode.USAGE
    assert words in capsys.readouterr().err


# --- peers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one_by_one", [True, False])
def test_llama_cpp_makes_room_as_it_does_itself(one_by_one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[FakeLlama] = []

    def make(**arguments: Any) -> FakeLlama:
        made.append(FakeLlama(**arguments))
        return made[-1]

    monkeypatch.setitem(sys.modules, "llama_cpp", types.SimpleNamespace(Llama=make))
    monkeypatch.setattr(peers, "version", lambda name: "0.3")
    method = peers.LlamaCpp(Path("m.gguf"), BUDGET, 4, 1, one_by_one=one_by_one)
    method.start()
    assert method.prefill(IDS[:40]) == 2
    method.prefill(IDS[40:200])
    lengths = []
    for _ in range(60):
        method.decode_step(1)
        lengths.append(made[0].n_tokens)
    kept = [made[0].cells[at] for at in sorted(made[0].cells)]
    assert kept[:4] == [0, 1, 2, 3]
    assert kept[4:] == list(range(260 - len(kept) + 4, 260))
    assert max(lengths) == BUDGET
    assert min(lengths) == (BUDGET if one_by_one else BUDGET + 1 - 22)
    method.close()
    method.start()
    assert len(made) == 1  # loaded once


def test_llama_cpp_reads_a_prompt_that_fits_in_batches_of_its_default_size(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []

    class Noted(FakeLlama):
        def eval(self, tokens: list[int]) -> None:
            batches.append(len(tokens))
            super().eval(tokens)

    monkeypatch.setitem(sys.modules, "llama_cpp", types.SimpleNamespace(Llama=Noted))
    monkeypatch.setattr(peers, "version", lambda name: "0.3")
    method = peers.LlamaCpp(Path("m.gguf"), 1200, 4, 1, one_by_one=False)
    method.start()
    method.prefill(list(range(1100)))
    method.prefill(list(range(600)))
    assert batches == [512, 512, 76, 299, 299, 2]


def test_peers_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert peers.find_peers(Path("m.gguf"), 64, 4, 1) == (
        [],
        ["llama.cpp was skipped: llama-cpp-python is not installed (pip install llama-cpp-python)."],
    )
    monkeypatch.setattr(peers, "find_spec", lambda name: object())
    assert "there is no GGUF file of this model" in peers.find_peers(None, 64, 4, 1)[1][0]


def test_llama_cpp_writes_what_we_write(default_model_home: Path) -> None:
    pytest.importorskip("llama_cpp")
    from streamchat.models.bundled.default import default_gguf
    from streamchat.models.load import load_model
    from streamchat.verify.text import help_topic_ids

    loaded = load_model("default", dtype="float32")
    ids = help_topic_ids(loaded.tokenizer, 100)
    ours = open_stream(make_method("streamchat", 256, 4), loaded.model, choose_fit(loaded.model))
    (theirs, _), _ = peers.find_peers(default_gguf(), 256, 4, 1)
    written = []
    for method in (ours, theirs):
        method.start()
        token, out = method.prefill(ids), []
        for _ in range(8):
            out.append(token)
            token = method.decode_step(token)
        method.close()
        written.append(out)
    assert written[0] == written[1]
