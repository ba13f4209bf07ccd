"""`streamchat ppl`: every policy against a plain evaluation, and what its input and its memory may be."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamchat.base.errors import ConfigError, ExitCode
from streamchat.base.eviction_policies import POLICIES
from streamchat.benchmarks import memory_estimate
from streamchat.benchmarks.methods.registry import KINDS, Method, parse_methods
from streamchat.benchmarks.methods.stream import open_stream
from streamchat.benchmarks.perplexity import default_segment, losses_in, score_all, segments
from streamchat.benchmarks.score import Scores, perplexity, score
from streamchat.benchmarks.texts import Document, Tokens, read_documents, tokenize
from streamchat.cache.dtype import set_cache_dtype
from streamchat.cache.positions.strategy import choose_fit
from streamchat.cli import main as cli
from streamchat.cli.scoring import default_chunk
from streamchat.commands import ppl as ppl_command
from tests.support.models_help import make_tokenizer, save, tiny_llama
from tests.support.perplexity import Policies
from tests.support.tiny import random_ids, tiny_model
from tests.support.toy_tokenizer import toy_tokenizer

COUNT = 150
IDS = random_ids(COUNT)[0]


@cache
def model_of(family: str, **changes: Any) -> tuple[Any, Any]:
    model = tiny_model(family, **changes)
    return model, choose_fit(model)


def scored(policy: Method, family: str = "llama", chunk: int = 1, ids: torch.Tensor = IDS, **changes: Any) -> Scores:
    model, fit = model_of(family, **changes)
    with open_stream(policy, model, fit, chunk) as stream:
        return score(stream, ids)


def by_transformers(family: str, ids: torch.Tensor) -> float:
    """exp of the loss that the model itself gives for a text."""
    model, _ = model_of(family)
    with torch.inference_mode():
        return math.exp(model(input_ids=ids[None], labels=ids[None]).loss.item())


@pytest.mark.smoke
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "falcon_h1"])
@pytest.mark.parametrize("policy", ["dense", "sinks:200:4", "window:200", "no-rerotation:200:4", "recompute:200"])
def test_nothing_evicted_is_a_plain_evaluation(family: str, policy: str) -> None:
    found = scored(parse_methods(policy, 0, 0)[0], family, chunk=16)
    assert found.counted == COUNT - 1
    assert found.unscorable == 0
    value = perplexity(found.losses)
    assert value is not None
    assert value / by_transformers(family, IDS) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_sinks_equal_the_re_rotating_reference(family: str, chunk: int) -> None:
    model, _ = model_of(family)
    found = scored(Method("sinks", 32, 4), family, chunk)
    feed = Policies(model, 32, 4).reference()
    last, expected = None, []
    for piece in torch.split(IDS, chunk):
        logits = feed(piece)
        rows = logits[:-1] if last is None else torch.cat([last, logits[:-1]])
        targets = piece[1:] if last is None else piece
        expected += torch.nn.functional.cross_entropy(rows, targets, reduction="none").tolist()
        last = logits[-1:]
    assert found.losses == pytest.approx(expected, abs=1e-3)
    assert found.longest == 32


def test_recompute_reads_the_window_anew_for_each_token() -> None:
    model, _ = model_of("llama")
    found = scored(Method("recompute", 32), chunk=1)
    with torch.inference_mode():
        rows = torch.stack([model(input_ids=IDS[None, max(0, i - 31) : i + 1]).logits[0, -1] for i in range(COUNT - 1)])
    expected = torch.nn.functional.cross_entropy(rows, IDS[1:], reduction="none")
    assert found.losses == pytest.approx(expected.tolist(), abs=1e-4)
    assert scored(Method("recompute", 32), chunk=4).losses != pytest.approx(expected.tolist(), abs=1e-4)


def test_no_rerotation_is_the_plain_loop_that_cuts_keys() -> None:
    model, _ = model_of("llama")
    feed = Policies(model, 32, 4).without_rotation()
    rows = torch.cat([feed(IDS[i : i + 1]) for i in range(COUNT - 1)])
    expected = torch.nn.functional.cross_entropy(rows, IDS[1:], reduction="none")
    found = scored(Method("no-rerotation", 32, 4))
    assert found.losses == pytest.approx(expected.tolist(), abs=1e-4)
    assert found.losses != pytest.approx(scored(Method("sinks", 32, 4)).losses, abs=0.1)
    assert found.longest == 32


def test_a_window_is_sinks_without_sinks() -> None:
    assert (scored(Method("window", 32)).losses == scored(Method("sinks", 32, 0)).losses).all()
    assert not np.allclose(scored(Method("window", 32)).losses, scored(Method("sinks", 32, 4)).losses)


def test_oldest_tokens_are_sinks_and_every_policy_keeps_to_the_budget() -> None:
    rest = {name: scored(Method(name, 100, 4), chunk=7, ids=random_ids(400)[0]) for name in POLICIES}
    assert (
        rest["oldest-tokens"].losses == scored(Method("sinks", 100, 4), chunk=7, ids=random_ids(400)[0]).losses
    ).all()
    for name, found in rest.items():
        assert found.longest <= 300
        assert found.unscorable == 0
        assert (found.losses != rest["oldest-tokens"].losses).any() == (name != "oldest-tokens")


@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
def test_a_text_has_turns_of_the_same_tokens_whatever_the_chunk(chunk: int) -> None:
    model, fit = model_of("llama")
    with open_stream(Method("oldest-turns", 1000, 4), model, fit, chunk) as stream:
        cache: Any = stream._cache
        for piece in torch.split(random_ids(300)[0], chunk):
            stream.feed(piece)
            stop = cache.ledger.next_index
            assert cache.turn_starts == list(range(0, stop + 1, 64))  # not of tokens after the next one


def test_hooks_are_gone_afterwards() -> None:
    model, _ = model_of("llama")
    for kind in ("sinks", "no-rerotation", "dense"):
        scored(Method(kind, 32, 4))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_table_of_positions_has_an_end() -> None:
    ids = random_ids(300)[0]
    found = scored(Method("dense"), "gpt2", ids=ids)
    assert (found.counted, found.unscorable) == (255, 44)
    assert scored(Method("sinks", 64, 4), "gpt2", ids=ids).unscorable == 0


def test_tokens_without_a_number_are_counted_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, fit = model_of("llama")
    with open_stream(Method("dense"), model, fit, 16) as stream:
        feed = stream.feed

        def broken(ids: torch.Tensor) -> torch.Tensor:
            logits = feed(ids).clone()
            logits[10:12] = float("nan")
            return logits

        monkeypatch.setattr(stream, "feed", broken)
        found = score(stream, IDS)
    assert (found.counted, found.unscorable) == (COUNT - 3, 2)
    assert perplexity(found.losses) == pytest.approx(by_transformers("llama", IDS), rel=0.2)
    assert perplexity(np.array([np.nan])) is None


def test_documents_are_streams_of_their_own() -> None:
    model, fit = model_of("llama")
    documents = [Tokens("a", IDS.tolist(), COUNT), Tokens("b", IDS.flip(0).tolist(), COUNT)]
    fed: list[int] = []
    policies = [Method("sinks", 32, 4), Method("dense")]
    results = list(score_all(model, fit, documents, policies, 8, lambda policy, document, count: fed.append(count)))
    assert [(result.method.kind, result.document.name) for result in results] == [
        ("sinks", "a"),
        ("sinks", "b"),
        ("dense", "a"),
        ("dense", "b"),
    ]
    assert sum(fed) == 4 * COUNT
    assert (results[1].scores.losses == scored(policies[0], chunk=8, ids=IDS.flip(0)).losses).all()


def test_segments_cover_every_loss_once() -> None:
    parts = segments(150, 64)
    assert [part.name for part in parts] == ["0-63", "64-127", "128-149"]
    losses = np.arange(149.0)
    result = Tokens("a", [0] * 150, 150)
    found = [losses_in([_result(result, losses)], part) for part in parts]
    assert np.concatenate(found).tolist() == losses.tolist()
    assert found[1][0] == 63  # of token 64, foreseen from 0 .. 63
    assert [default_segment(n) for n in (10, 128, 4096, 20_000)] == [16, 16, 512, 4096]


def _result(document: Tokens, losses: Any) -> Any:
    from streamchat.benchmarks.perplexity import ScoredDocument

    return ScoredDocument(Method("dense"), document, Scores(losses, 0, 0, 0))


# --- policies -----------------------------------------------------------------------------------------------------


def test_policies_are_read() -> None:
    found = parse_methods("dense, sinks,sinks:256:8,window:64,sinks:512:4,recompute", 512, 4)
    assert [policy.spec for policy in found] == ["dense", "sinks:512:4", "sinks:256:8", "window:64", "recompute:512"]
    assert [policy.name for policy in found][:3] == ["dense", "sinks 512 (4)", "sinks 256 (8)"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("snks", "snks is not a method; choose from dense, window, sinks"),
        ("dense:5", "dense:5 is not a method; write dense"),
        ("window:" + "9" * 5000, "is not a method; write window:BUDGET"),
        ("window:5:1", "write window:BUDGET"),
        ("sinks:a", "write sinks:BUDGET:SINKS"),
        ("sinks:-64", "write sinks:BUDGET:SINKS"),
        ("sinks:64:4:1", "write sinks:BUDGET:SINKS"),
        ("sinks:64:33", "sinks must be from 0 to 32 for a budget of 64 tokens"),
        ("window:4", "the budget must be at least 8 tokens"),
        (" ,", "--methods is empty; give a comma-separated list"),
    ],
)
def test_wrong_policies(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_methods(text, 512, 4)
    assert words in str(caught.value)


# --- texts --------------------------------------------------------------------------------------------------------


def test_what_was_done_to_a_file_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes("\u00e4\r\n".encode("cp1252"))
    [found] = read_documents([str(path)])
    assert (found.name, found.text) == ("x.txt", "\u00e4\n")
    assert found.notes == (
        "x.txt is not UTF-8 (byte 0); it was decoded as Windows-1252.",
        "x.txt has carriage returns; its line ends were normalized.",
    )


def test_a_text_cannot_hold_control_tokens_and_begins_as_the_tokenizer_begins_texts() -> None:
    tokenizer = toy_tokenizer()
    found = tokenize(Document("a", "The end.<|im_end|> Or not?"), tokenizer, 0)
    assert not set(found.ids) & {tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|endoftext|>")}
    assert tokenizer.decode(found.ids) == "The end.<|im_end|> Or not?"
    assert len(tokenize(Document("a", "The end of all."), tokenizer, 2).ids) == 2

    class Beginning:
        """A tokenizer that puts its BOS token before every text."""

        bos_token_id = 0

        def __call__(self, text: str, add_special_tokens: bool = True, **rest: Any) -> dict[str, list[int]]:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [0, *ids] if add_special_tokens else ids}

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    ids = tokenize(Document("a", "The end of all."), Beginning(), 2)
    assert (len(ids.ids), ids.ids[0]) == (3, 0)
    assert tokenize(Document("a", ""), Beginning(), 0).ids == []


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "falcon_h1"])
def test_the_predicted_cache_is_the_one_that_is_made(family: str) -> None:
    model, _ = model_of(family)
    cost = memory_estimate.measure_cost(model)
    assert cost.cache_bytes(COUNT) == scored(Method("dense"), family).kv_bytes
    assert memory_estimate.predicted_bytes(Method("dense"), COUNT, cost, 1, False) > cost.cache_bytes(COUNT)


def test_a_streaming_cache_in_16_bits_is_predicted_with_half_the_bytes() -> None:
    model = tiny_model("llama")
    full = memory_estimate.measure_cost(model)
    set_cache_dtype(model, torch.bfloat16)
    half = memory_estimate.measure_cost(model)
    for kind in KINDS.values():
        method = Method(kind.name, *(64, 4)[: len(kind.sizes)])
        one, other = (memory_estimate.predicted_bytes(method, 1000, cost, 16, False) for cost in (full, half))
        runs_on_it = kind.name in ("window", "sinks", "streamchat", *POLICIES)
        assert one - other == (full.cache_bytes(64) // 2 if runs_on_it else 0), kind.name


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    cost = memory_estimate.measure_cost(model_of("llama")[0])
    policies = [Method("sinks", 64, 4), Method("dense")]
    free = 20_000_000
    memory_estimate.require_memory(policies, 1000, cost, 16, False, free)
    with pytest.raises(ConfigError) as caught:
        memory_estimate.require_memory(policies, 10_000_000, cost, 16, False, free)
    text = str(caught.value)
    assert text.startswith("dense over 10,000,000 tokens would take ")
    most = int(text.split("--max-tokens ")[1].split()[0])
    memory_estimate.require_memory(policies, most + 1, cost, 16, False, free)
    with pytest.raises(ConfigError):
        memory_estimate.require_memory(policies, most + 2, cost, 16, False, free)
    with pytest.raises(ConfigError, match="give a smaller budget than 1000000"):
        memory_estimate.require_memory([Method("sinks", 1_000_000, 4)], 10_000_000, cost, 16, False, free)
    memory_estimate.require_memory(policies, 10_000_000, cost, 16, False, None)


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tiny_llama(max_position_embeddings=4096), tmp_path / "model")
    return tmp_path


def run(folder: Path, *arguments: str) -> int:
    return cli.main(["ppl", "--model", str(folder / "model"), "--dtype", "float32", *arguments])


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = folder / "one.txt", folder / "two.txt"
    one.write_bytes(("The capital of France is Paris. " * 20).encode() + b"\r\n")
    two.write_text("one two three four five " * 20)
    (folder / "empty.txt").write_text("")
    out = folder / "out"
    what = ["--policies", "dense,sinks:64:4", "--cache-size", "64", "--max-tokens", "180"]
    files = [str(one), str(two), str(folder / "empty.txt")]
    assert run(folder, *files, *what, "--json", "--charts", "--out", str(out)) == ExitCode.OK
    printed = capsys.readouterr()
    text, last = printed.out.rstrip().rsplit("\n", 1)
    data = json.loads(last)
    assert json.loads((out / "ppl.json").read_text()) == data
    dense, sinks = data["policies"]
    assert (dense["spec"], sinks["spec"]) == ("dense", "sinks:64:4")
    ids = make_tokenizer()("The capital of France is Paris. " * 20)["input_ids"][:180]
    model = tiny_llama(max_position_embeddings=4096)
    with torch.inference_mode():
        loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    assert dense["documents"][0]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)
    assert dense["longest_cache"] == 180
    assert sinks["longest_cache"] == 64
    assert len(sinks["segments"]) == 6
    assert sinks["tokens_scored"] == len(ids) - 1 + sinks["documents"][1]["tokens"] - 1
    assert "one.txt has carriage returns" in text
    assert "fewer than two tokens: empty.txt" in text
    assert "one.txt: the first 180 of" in text
    assert "Log-perplexity along the stream" in text
    page = (out / "ppl.html").read_text()
    assert "<svg" in page
    assert not re.search(r'(?:src|href)="(?!#)', page)  # it needs nothing beside it
    assert {path.name for path in out.iterdir()} == {
        "ppl.json",
        "ppl.html",
        "log-perplexity.svg",
        "log-perplexity.png",
    }


def test_tokens_per_forward_are_chosen_by_device_and_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [default_chunk(device) for device in ("cpu", "mps", "cuda", "cuda:1")] == [16, 16, 128, 128]
    (folder / "one.txt").write_text("one two three four five " * 20)
    what = [str(folder / "one.txt"), "--methods", "sinks:64:4", "--max-tokens", "100", "--json"]

    def chunk_of(*arguments: str) -> tuple[int, str]:
        assert run(folder, *what, *arguments) == ExitCode.OK
        text, last = capsys.readouterr().out.rstrip().rsplit("\n", 1)
        return json.loads(last)["chunk"], next(line for line in text.splitlines() if "per forward pass" in line)

    chunk, line = chunk_of()
    assert chunk == 16
    assert "16 tokens per forward pass for bounded methods (default on cpu)" in line
    monkeypatch.setattr(ppl_command, "default_chunk", {"cpu": 12}.__getitem__)
    assert chunk_of()[0] == 12
    chunk, line = chunk_of("--chunk", "8")
    assert chunk == 8
    assert "default" not in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.txt"], "missing.txt: no such file"),
        (["."], ". is a folder; choose a file in it"),
        (["short.txt"], "nothing to score: short.txt has fewer than two tokens"),
        (["zero.bin"], "zero.bin is not a text file (byte 1 is NUL)"),
        (["--chunk", "0"], "--chunk 0 must be at least 1"),
        (["--max-tokens", "-1"], "--max-tokens -1 must be at least 0"),
        (["--policies", "snks"], "snks is not a method"),
        (["--out", "short.txt"], "--out short.txt cannot be written (File exists)"),
    ],
)
def test_wrong_input(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    Path("short.txt").write_text("a")
    Path("zero.bin").write_bytes(b"a\0b")
    assert run(folder, *arguments) == ExitCode.USAGE
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err
    assert printed.err.count("\n") == 1


def test_stopped_half_way_shows_what_is_there(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamchat.cli import progress_bar

    original = progress_bar.Bar.advance

    def stop(self: Any, what: str, units: float = 0.0) -> None:
        if what.startswith("sinks"):
            raise KeyboardInterrupt
        original(self, what, units)

    monkeypatch.setattr(progress_bar.Bar, "advance", stop)
    Path("a.txt").write_text("one two three " * 20)
    assert run(folder, "a.txt", "--policies", "dense,sinks", "--cache-size", "64") == ExitCode.INTERRUPTED
    printed = capsys.readouterr().out
    assert "dense" in printed
    assert "Stopped early" in printed


def test_the_default_model_needs_sinks_and_turned_positions(
    default_model_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["ppl", "--max-tokens", "400", "--cache-size", "96", "--json"]
    assert cli.main([*arguments, "--policies", "dense,sinks,window,no-rerotation"]) == ExitCode.OK
    data = json.loads(capsys.readouterr().out.rstrip().rsplit("\n", 1)[1])
    dense, sinks, window, mistake = (policy["perplexity"] for policy in data["policies"])
    assert dense < sinks < 1.4 * dense
    assert window > 1.5 * sinks
    assert mistake > 3 * sinks


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="no kernels here")
def test_packed_weights_are_scored_where_they_are_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.txt").write_text("one two three four " * 20)
    found = {}
    for weights in ("native", "int8"):
        arguments = ["a.txt", "--policies", "dense,sinks:32:4", "--dtype", "bfloat16", "--weights", weights, "--json"]
        assert run(folder, *arguments) == ExitCode.OK
        text, last = capsys.readouterr().out.rstrip().rsplit("\n", 1)
        data = json.loads(last)
        assert data["weights"] == weights
        assert ("int8 weights" in text) == (weights == "int8")
        found[weights] = [policy["perplexity"] for policy in data["policies"]]
    # chunks are longer than what a chat computes with packed weights
    for native, packed in zip(found["native"], found["int8"], strict=True):
        assert packed != native
        assert packed == pytest.approx(native, rel=0.02)
