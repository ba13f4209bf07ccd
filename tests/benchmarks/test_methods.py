"""The registry of methods: every entry can be scored and timed, and names of earlier versions still mean the same."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from streamchat.base.errors import ConfigError
from streamchat.benchmarks.cell import Cell, ModelChoice
from streamchat.benchmarks.methods.registry import (
    ALIASES,
    KINDS,
    SCORED,
    Method,
    make_method,
    parse_kinds,
    parse_methods,
)
from streamchat.benchmarks.methods.stream import ModelStream, open_stream
from streamchat.benchmarks.score import score
from streamchat.cache.positions.strategy import choose_fit
from streamchat.cli import main as cli
from streamchat.cli import parser
from tests.support.tiny import random_ids, tiny_model

COUNT, BUDGET = 150, 48
IDS = random_ids(COUNT)[0]


@cache
def model_and_fit() -> tuple[Any, Any]:
    model = tiny_model("llama")
    return model, choose_fit(model)


def opened(kind: str, budget: int = BUDGET) -> ModelStream:
    return open_stream(make_method(kind, budget, 4), *model_and_fit(), 16)


def losses(kind: str, budget: int = BUDGET) -> Any:
    with opened(kind, budget) as stream:
        return score(stream, IDS).losses


@pytest.mark.parametrize("kind", SCORED)
def test_every_method_scores_as_dense_while_nothing_is_evicted(kind: str) -> None:
    assert losses(kind, 4 * COUNT) == pytest.approx(losses("dense"), abs=1e-3)


@pytest.mark.parametrize("kind", SCORED)
def test_every_method_stays_in_its_budget(kind: str) -> None:
    with opened(kind) as stream:
        found = score(stream, IDS)
        assert (found.counted, found.unscorable) == (COUNT - 1, 0)
        assert found.longest == COUNT if stream.method.grows else found.longest <= BUDGET
        assert (stream.kv_bytes > 0) == (stream.length > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_is_timed_and_leaves_nothing_on_the_model(kind: str) -> None:
    model, _ = model_and_fit()
    written = []
    for _ in range(2):  # a second stream starts empty
        with opened(kind) as stream:
            token = stream.prefill(IDS[:20].tolist())
            stream.append(IDS[20:30].tolist(), 1)
            written.append((token, stream.decode_step(token)))
            assert len(stream.decode_timed(token, 2)) == 2
    assert written[0] == written[1]
    assert written[0][0] == int(model(input_ids=IDS[None, :20]).logits[0, -1].argmax())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_the_chat_s_cache_evicts_in_blocks_and_the_rolling_window_does_not() -> None:
    lengths: dict[str, list[int]] = {}
    for kind in ("sinks", "streamchat", "oldest-tokens"):
        with opened(kind) as stream:
            lengths[kind] = []
            for token in IDS:
                stream.feed(token[None])
                lengths[kind].append(stream.length)
    assert min(lengths["sinks"][BUDGET:]) == BUDGET
    assert min(lengths["streamchat"][BUDGET:]) < BUDGET - 8
    assert lengths["oldest-tokens"] == lengths["sinks"]


# --- names --------------------------------------------------------------------------------------------------------


def test_names_of_earlier_versions_are_accepted() -> None:
    assert [method.spec for method in parse_methods("generate,cut:64,cut:64:4", 32, 4)] == [
        "dense",
        "no-rerotation:64:4",
    ]
    assert parse_kinds("streamchat,generate,re-read,cut,generate", tuple(KINDS)) == [
        "streamchat",
        "dense",
        "re-read",
        "no-rerotation",
    ]
    assert not ALIASES.keys() & KINDS.keys()


@pytest.mark.parametrize("command", ["ppl", "sweep", "bench"])
@pytest.mark.parametrize("flag", ["--methods", "--policies"])
def test_every_command_takes_both_flags(command: str, flag: str) -> None:
    assert parser.parse([command, flag, "dense,sinks"]).methods == "dense,sinks"


@pytest.mark.parametrize(("command", "flag"), [("ppl", "--policies"), ("sweep", "--methods")])
def test_what_differs_only_between_turns_is_not_scored(
    command: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, flag, "re-read"]) == 2
    assert "re-read is not a method; choose from dense, window" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="give names only"):
        parse_kinds("dense,sinks:64")


def test_saved_sweeps_are_found_again() -> None:
    """The ids are those that version 0.1.0 wrote."""
    model = ModelChoice("m", "cpu", "float32", "sdpa")
    methods = {
        "af226eb1e56fb220": Method("sinks", 32, 4),
        "4ef53f615cad9a42": Method("no-rerotation", 64, 0),
        "b04236a83d693243": Method("dense"),
    }
    for known, method in methods.items():
        assert Cell(model, method, "a.txt", "d", 100, 16).id == known


def test_native_weights_are_for_others_only() -> None:
    model, fit = model_and_fit()
    for kind in KINDS:
        stream = open_stream(make_method(kind, BUDGET, 4), model, fit, native_weights=True)
        assert stream._native_weights == (KINDS[kind].stream.split(".")[0] != "streaming")
