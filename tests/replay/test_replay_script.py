"""What a replay reads, and how it tells a trend from noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from streamchat.base.errors import ConfigError
from streamchat.replay import invariants, trend
from streamchat.replay.durations import parse_duration
from streamchat.replay.script import Format, read_scripts, steps

# --- scripts ----------------------------------------------------------------------------------------------------


def script_of(tmp_path: Path, text: str | bytes, kind: Format = "auto") -> Any:
    path = tmp_path / "script"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_scripts([path], kind)


def said(script: Any) -> list[list[tuple[str, str | None]]]:
    return [[(turn.text, turn.reply) for turn in dialogue.turns] for dialogue in script.dialogues]


def test_conversations(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "a"},
                      {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]},
        {"id": 2, "messages": [{"role": "user", "content": "d"}, {"role": "user", "content": "e"},
                               {"role": "assistant", "content": "f"}, {"role": "assistant", "content": "g"}]},
    ]  # fmt: skip
    script = script_of(tmp_path, "\n".join(map(json.dumps, rows)) + "\n\n")
    assert said(script) == [[("a", "b"), ("c", None)], [("d", None), ("e", "f\n\ng")]]
    assert [dialogue.system for dialogue in script.dialogues] == ["Be kind.", None]
    assert script.problems == []
    assert script.turns == 4


def test_mt_bench_messages_and_text(tmp_path: Path) -> None:
    assert said(script_of(tmp_path, '{"question_id": 1, "turns": ["a", "b"]}\n{"turns": ["c"]}')) == [
        [("a", None), ("b", None)],
        [("c", None)],
    ]
    lines = [("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("system", "Now be brief."), ("user", "c")]
    script = script_of(tmp_path, "\n".join(json.dumps({"role": r, "content": c}) for r, c in lines))
    assert said(script) == [[("a", "b"), ("System: Now be brief.", None), ("c", None)]]
    assert script.dialogues[0].system == "Be kind."
    assert said(script_of(tmp_path, "\ufeffhello\r\n\r\n{not json\r\n  bye  ")) == [
        [("hello", None), ("{not json", None), ("bye", None)]
    ]
    assert said(script_of(tmp_path, '{"turns": ["a"]}', "text")) == [[('{"turns": ["a"]}', None)]]


def test_our_own_exports_can_be_replayed(tmp_path: Path) -> None:
    from streamchat.sessions.transcripts.export import export
    from streamchat.store.store import Store
    from tests.support.saved_sessions import saved

    session = saved()
    for kind in ("jsonl", "replay"):
        with Store() as store:
            script = script_of(tmp_path, export(store.load(session), kind))
        assert said(script) == [[(f"question {n}", f"answer *{n}*") for n in (1, 2, 3)]]
        assert script.dialogues[0].system == "Be kind."
        assert script.problems == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", "this is not JSON (column 2: "),
        ("[1, 2]", "it is JSON, a list; accepted formats: "),
        ('{"messages": 7}', '"messages" must be a list'),
        ('{"messages": [{"role": "robot", "content": "x"}]}', 'unknown role "robot"; known roles are system, '),
        (
            '{"messages": [{"role": "user", "content": null}]}',
            "the content of a message from user must be a string, not null",
        ),
        ('{"messages": [{"content": "x"}]}', 'a message needs "role" and "content", or "from" and "value"'),
        ('{"turns": ["a"]}', "this record has the format mt-bench, but the file has conversations"),
        ('{"prompt": "a", "completion": "b"}', 'it is JSON, an object with "prompt", "completion"; accepted formats: '),
        ('{"messages": []}', "it contains no user messages"),
        (
            '{"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]}',
            "which was skipped",
        ),
        ("[" * 50_000, "this is not JSON (it is nested too deeply)"),
    ],
)
def test_broken_lines_are_told_with_their_place(tmp_path: Path, line: str, reason: str) -> None:
    good = '{"messages": [{"role": "user", "content": "a"}]}'
    script = script_of(tmp_path, f"{good}\n{line}\n{good}")
    [problem] = script.problems
    place, _, found = problem.partition(": ")
    assert place.endswith("script:2")
    assert reason in found
    assert [("a", None)] in said(script)
    assert said(script)[0] == said(script)[-1]


def test_bytes_that_are_no_text_are_told(tmp_path: Path) -> None:
    cafe = "caf\N{LATIN SMALL LETTER E WITH ACUTE}"
    for content, read, how in (
        (cafe.encode("latin-1"), cafe, "(byte 3); it was decoded as Windows-1252"),
        (f"{cafe} {cafe} {cafe}".encode()[:-1], f"{cafe} {cafe} caf\ufffd", "(byte 15); 1 damaged byte became U+FFFD"),
    ):
        script = script_of(tmp_path, content + b"\nfine")
        assert script.problems == [f"{tmp_path / 'script'}: it is not UTF-8 {how}"]
        assert said(script) == [[(read, None), ("fine", None)]]
    with pytest.raises(ConfigError, match="missing: no such file"):
        read_scripts([tmp_path / "missing"])


def test_the_steps_of_a_run(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "system", "content": "S1"}, {"role": "user", "content": "a"},
                      {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]},
        {"messages": [{"role": "system", "content": "S2"}, {"role": "user", "content": "d"}]},
    ]  # fmt: skip
    script = script_of(tmp_path, "\n".join(map(json.dumps, rows)))
    endless = list(steps(script, fresh=False, teacher_forced=True, repeat=2))
    assert [(s.index, s.text, s.reply, s.starts, s.system) for s in endless] == [
        (0, "a", "b", True, "S1"),
        (1, "c", None, False, None),
        (2, "System: S2\n\nd", None, False, None),
        (3, "a", "b", False, None),
        (4, "c", None, False, None),
        (5, "System: S2\n\nd", None, False, None),
    ]
    fresh = list(steps(script, fresh=True, teacher_forced=False, repeat=1))
    assert [(s.text, s.reply, s.starts, s.system) for s in fresh] == [
        ("a", None, True, "S1"),
        ("c", None, False, None),
        ("d", None, True, "S2"),
    ]
    forever = steps(script, fresh=True, teacher_forced=False, repeat=None)
    assert [next(forever).index for _ in range(10)] == list(range(10))
    assert list(steps(script_of(tmp_path, ""), fresh=False, teacher_forced=False, repeat=None)) == []


def test_durations() -> None:
    assert [parse_duration(text, "--duration") for text in ("45", "90s", "30m", "8h", "2d", "1h30m", "0.5h")] == [
        45, 90, 1800, 28800, 172800, 5400, 1800,
    ]  # fmt: skip
    for wrong in ("", "h", "8 hours", "-5s", "0", "1x", "5s!", "٣s", "1_0"):
        with pytest.raises(ConfigError, match="is not a duration; give for example 90s, 30m, 8h or 2d"):
            parse_duration(wrong, "--duration")


# --- trends -----------------------------------------------------------------------------------------------------


def test_a_trend_is_robust_and_honest_about_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, generator=generator)
    flat = (100 + noise).tolist()
    flat[50] = 10_000.0  # one slow turn is no trend
    found = trend.trend(flat)
    assert found is not None
    assert abs(found.change) < 1
    assert found.low < 0 < found.high
    rising = trend.trend((100 + noise + torch.arange(400) * 0.05).tolist())
    assert rising is not None
    assert rising.grows(15)
    assert not rising.grows(25)
    assert rising.change == pytest.approx(20, abs=1)
    assert trend.trend([1.0] * 29) is None
    long = trend.trend([float(i) for i in range(5000)])
    assert long is not None
    assert long.change == pytest.approx(4999)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", [30, 31, 200, 700])
@pytest.mark.parametrize("rounded", [False, True], ids=["distinct", "tied"])
def test_a_trend_is_that_of_scipy(seed: int, count: int, rounded: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator) + torch.arange(count) * 0.01 * seed
    y = (values.round() if rounded else values).double().tolist()
    found = trend.trend(y)
    assert found is not None
    x = np.arange(count)
    if count > trend.MAX_POINTS:
        x = np.linspace(0, count - 1, trend.MAX_POINTS).round().astype(int)
    expected = stats.theilslopes(np.asarray(y)[x], x, alpha=trend.CONFIDENCE)
    assert (found.change, found.low, found.high) == pytest.approx(
        tuple(each * (count - 1) for each in (expected.slope, expected.low_slope, expected.high_slope))
    )


def test_equal_values_have_no_trend() -> None:
    found = trend.trend([2.0] * 40)
    assert found is not None
    assert (found.change, found.low, found.high, found.median) == (0, 0, 0, 2)


def test_prompt_length_is_allowed_for() -> None:
    """Longer prompts later on are no slowing down; a slower machine is."""
    longer = [(tokens, 0.01 + 0.001 * tokens) for tokens in range(20, 220)]
    found = trend.trend(invariants.without_length(longer))
    assert found is not None
    assert abs(found.change) < 0.01
    slower = [(20 + 40 * (i % 5), (0.01 + 0.001 * (20 + 40 * (i % 5))) * (1 + i / 200)) for i in range(200)]
    found = trend.trend(invariants.without_length(slower))
    assert found is not None
    assert found.grows(0.25)
