"""The list of models as rows, and the switch to the one that was chosen."""

from __future__ import annotations

import pytest

from streamchat.base import events as ev
from streamchat.base.requests import CancelFetch, FetchModel, Request, SwitchModel
from streamchat.frontend.model_list import ModelList, columns, models_text
from streamchat.frontend.model_switch import ModelSwitch
from streamchat.models.choices import ModelChoice

GB = 1_000_000_000
HERE = ModelChoice("default", "SmolLM2-135M-Instruct", "bundled", "/models/default", True, 105_000_000, GB, 8192)
ALIAS = ModelChoice("pythia-410m", "EleutherAI/pythia-410m", "hub", "EleutherAI/pythia-410m", False, GB, 3 * GB, 2048)
ODD = ModelChoice("./\x1b[31ma\n.gguf", "in this folder", "here", "/x/a.gguf", True, 0, 0, 0)
LIST = ModelList((HERE, ALIAS, ODD), 2 * GB, "/models/default")


def test_cells() -> None:
    assert [LIST.cells(each) for each in LIST.choices] == [
        ("default", "105 MB", "8,192", "in use"),
        ("pythia-410m", "~1.0 GB", "2,048", "fetch · too large"),
        ("./a .gguf", "?", "?", ""),
    ]
    assert ModelList((HERE,), 2 * GB).cells(HERE)[3] == "fits"
    assert ModelList((HERE,), None).cells(HERE)[3] == ""


def test_text() -> None:
    assert models_text(LIST).splitlines() == [
        "model           size  context",
        "default       105 MB    8,192  in use",
        "pythia-410m  ~1.0 GB    2,048  fetch · too large",
        "./a .gguf          ?        ?",
    ]


def test_long_names_are_cut_in_the_middle() -> None:
    long = ModelChoice("someone/a-very-long-name-of-a-model-GGUF/file-Q4_K_M.gguf", "", "here", "", True, GB, GB, 2048)
    lines = columns(ModelList((long,), GB), [long], 50)
    assert max(map(len, lines)) <= 50
    assert "someone/a-ver" in lines[1]
    assert "Q4_K_M.gguf" in lines[1]
    assert "…" in lines[1]


@pytest.mark.parametrize(
    ("words", "names"),
    [("", 3), ("PYTHIA", 1), ("eleuther 410", 1), ("smollm2", 1), ("nothing", 0), ("folder", 1)],
)
def test_words_filter(words: str, names: int) -> None:
    assert len(LIST.matching(words)) == names


def test_details() -> None:
    assert LIST.details(ALIAS) == (
        "EleutherAI/pythia-410m; needs about 3.0 GB of memory (2.0 GB are free); about 1.0 GB must be fetched once"
    )
    assert LIST.details(ODD) == "in this folder"


def test_a_fetched_model_is_loaded_when_the_engine_is_idle() -> None:
    sent: list[Request] = []
    switch = ModelSwitch(sent.append)
    switch.fetch("pythia-410m")
    assert switch.text == "Fetching pythia-410m ..."
    switch.apply(ev.ModelFetching("pythia-410m", "Fetching EleutherAI/pythia-410m", 5, 10, "bytes"))
    assert switch.text == "Fetching EleutherAI/pythia-410m: 5 B of 10 B (50 %)"
    due = [switch.is_due]
    switch.apply(ev.ModelFetched("pythia-410m"))
    assert [*due, switch.is_due] == [False, True]
    assert switch.text == "pythia-410m is fetched and loads when this reply is done"
    switch.load_fetched()
    assert sent == [FetchModel("pythia-410m"), SwitchModel("pythia-410m")]
    assert not switch.is_active


@pytest.mark.parametrize("end", [ev.ModelFetched("a/b", "no network"), ev.ModelFetched("a/b", canceled=True)])
def test_a_fetch_that_fails_loads_nothing(end: ev.ModelFetched) -> None:
    sent: list[Request] = []
    switch = ModelSwitch(sent.append)
    switch.fetch("a/b")
    switch.apply(ev.ModelFetching("a/b", "Looking"))
    switch.apply(end)
    assert not switch.is_active
    assert sent == [FetchModel("a/b")]


def test_another_choice_replaces_the_first() -> None:
    sent: list[Request] = []
    switch = ModelSwitch(sent.append)
    switch.fetch("a/b")
    switch.fetch("c/d")
    switch.apply(ev.ModelFetched("a/b", canceled=True))
    assert switch.is_fetching("c/d")
    switch.load("./local")
    switch.apply(ev.ModelFetched("c/d"))
    assert not switch.is_active
    assert sent == [FetchModel("a/b"), FetchModel("c/d"), CancelFetch(), SwitchModel("./local")]


def test_the_same_choice_after_a_cancellation_is_not_ended_by_it() -> None:
    switch = ModelSwitch(lambda request: None)
    switch.fetch("a/b")
    switch.apply(ev.ModelFetching("a/b", "Looking"))
    switch.cancel()
    switch.fetch("a/b")
    switch.apply(ev.ModelFetched("a/b", canceled=True))  # of the first one
    assert switch.is_fetching("a/b")


def test_the_end_of_the_engine_cancels_it() -> None:
    sent: list[Request] = []
    switch = ModelSwitch(sent.append)
    switch.fetch("a/b")
    switch.apply(ev.EngineFailed("", "", 1))
    assert not switch.is_active
    assert sent[-1] == CancelFetch()
