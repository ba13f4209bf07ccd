"""A sample of the alignments of sinks, chunks and fill, and that a wrong one is noticed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from streamchat.cache.streaming import StreamingCache
from tests.support.family_runs import with_lost_sinks
from tools import alignments
from tools.alignments import BUDGET, FAMILIES, WAYS, Alignment, every_alignment, main


def test_a_sample_equals_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["--sample", "8", "--seed", "7"])
    assert (status, "64 cases" in capsys.readouterr().out) == (0, True)


def test_all_alignments_are_there() -> None:
    every = every_alignment()
    assert len(set(every)) == 9 * 33 * 5
    assert Alignment(8, 33, BUDGET + 2) in every
    assert Alignment(0, 1, BUDGET - 2).chunks() == [BUDGET - 2, 1, 1, 1, 1]
    assert Alignment(0, 33, BUDGET + 2).chunks() == [BUDGET, 1, 1, 33, 33, 1, 1]


@pytest.mark.parametrize("way", WAYS)
def test_a_cache_that_loses_its_sinks_is_noticed(
    way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lossy(*args: object, **kwargs: object) -> StreamingCache:
        return with_lost_sinks(StreamingCache(*args, **kwargs))  # type: ignore[arg-type]

    monkeypatch.setattr(alignments, "StreamingCache", lossy)
    assert main(["--only", f"4,7,{BUDGET + 1},{FAMILIES[0]},{way}"]) == 1
    assert "differ by" in capsys.readouterr().out


def test_a_cache_that_evicts_other_tokens_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = alignments.expected
    monkeypatch.setattr(
        alignments, "expected", lambda model, of, ids: read(model, replace(of, sinks=of.sinks + 1), ids)
    )
    assert main(["--only", f"4,7,{BUDGET},{FAMILIES[0]},sdpa"]) == 1
    assert "cached tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["--only", "9,1,48,llama,sdpa"], ["--only", "x"], ["--sample", "0"], ["--families", "gpt9"]]
)
def test_what_cannot_be_compared_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "nothing to compare; there are sinks 0 to 8" in capsys.readouterr().err
