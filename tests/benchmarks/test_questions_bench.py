"""`streamchat bench --questions`: every question with every choice of settings, scored by its regular expression."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from streamchat.base.errors import ConfigError, ExitCode
from streamchat.benchmarks import questions as bench
from streamchat.cli import main as cli
from streamchat.conversation.conversation import Conversation
from streamchat.conversation.generation import TurnOutcome
from tests.support.models_help import save, tiny_llama

RIGHT = {
    "What is 2 plus 3?": ["2 + 3 = 5.", "It is five."],
    "At how many degrees Celsius does water freeze?": ["Water freezes at 0 °C.", "At 0.", "At 0 degrees (32 °F)."],
    "What is the chemical formula of water?": ["H2O", "It is H₂O."],
    "What is the capital of Japan?": ["tokyo", "<think>\nOsaka?\n</think>\n\nTokyo"],
    "Which animal gives us wool?": ["A sheep does."],
}
WRONG = {
    "What is 2 plus 3?": ["15", "It is 6."],
    "At how many degrees Celsius does water freeze?": ["At 100 degrees.", "At 0.1 degrees.", "At 10 degrees.", "5.0"],
    "What is the chemical formula of water?": ["CO2"],
    "What is the capital of Japan?": ["Kyoto", "<think>\nTokyo?\n</think>\n\nOsaka"],
    "Which animal gives us wool?": ["The woolly mammoth."],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tiny_llama(max_position_embeddings=1024), tmp_path / "llama")


def run(folder: Path, *arguments: str) -> int:
    return cli.main(["bench", "--questions", "--model", str(folder), "--dtype", "float32", *arguments])


def test_there_are_40_different_questions_with_expressions_that_they_do_not_match_themselves() -> None:
    every = bench.questions()
    assert len({each.question for each in every}) == len(every) == 40
    for each in every:
        assert each.question.endswith("?")
        assert re.compile(each.answer)
        assert not each.is_answered_by(each.question)


@pytest.mark.parametrize("question", RIGHT)
def test_right_and_wrong_replies_are_told_apart(question: str) -> None:
    each = next(each for each in bench.questions() if each.question == question)
    assert all(each.is_answered_by(reply) for reply in RIGHT[question])
    assert not any(each.is_answered_by(reply) for reply in WRONG[question])


def test_all_questions_are_asked_with_each_row_and_seed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[float, float, int, int]] = []

    def answer(self: Conversation, text: str, *_: Any) -> TurnOutcome:
        """Names the capitals, at temperature 0 and with the first seed."""
        settings = self.settings
        assert not self.log.turns
        asked.append((settings.temperature, settings.top_p, settings.repetition_penalty == 1.0, settings.seed))
        is_right = "capital" in text and settings.seed < 4
        return TurnOutcome(
            1, "Paris, Rome or Tokyo" if is_right else "no idea", "stop" if is_right else "length", 5, 10
        )

    few = bench.questions()[:4]
    monkeypatch.setattr(bench, "questions", lambda: few)
    monkeypatch.setattr(Conversation, "run_turn", answer)
    rows = ["--sampling", "temperature=0.5,top_p=0.8", "--sampling", "temperature=0"]
    assert run(folder, *rows, "--seeds", "3", "--json") == ExitCode.OK
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(asked) == 3 * 4 + 4  # the seed has no effect at temperature 0
    assert [each[3] for each in asked[:12]] == list(range(12))
    assert {each[:3] for each in asked} == {(0.5, 0.8, True), (0.0, 1.0, True)}
    first, second = json.loads(last)["figures"]
    assert (first["right"], second["right"]) == ([3, 0, 0], [3])
    assert first["cut"] == 9
    assert second["wrong"] == {"Which river flows through London?": "no idea"}
    assert any(line.split()[:4] == ["temperature", "0.5,", "top_p", "0.8"] for line in lines)


def test_a_real_model_answers(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "REPLY_TOKENS", 4)
    few = bench.questions()[:3]
    monkeypatch.setattr(bench, "questions", lambda: few)
    assert run(folder, "--sampling", "temperature=0.9,min_p=0.1", "--seeds", "2", "--json") == ExitCode.OK
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    (figures,) = found["figures"]
    assert len(figures["right"]) == 2
    assert 0 < figures["mean_tokens"] <= 4
    assert (found["questions"], found["seeds"]) == (3, 2)


@pytest.mark.parametrize("text", bench.DEFAULT_ROWS)
def test_default_rows_are_valid(text: str) -> None:
    assert bench.parse_row(text).keys() == bench.OFF.keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("temperature", "--sampling 'temperature' must be NAME=VALUE with one of temperature, top_p"),
        ("seed=1", "--sampling 'seed=1' must be NAME=VALUE"),
        ("temperature=0.2,", "--sampling '' must be NAME=VALUE"),
        ("temperature=hot", "--sampling: temperature must be a number"),
        ("top_p=0", "--sampling: top_p = 0.0 is not valid"),
    ],
)
def test_a_row_that_is_not_valid_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        bench.parse_row(text)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sampling", "temperature=0"], "--sampling needs --questions"),
        (["--resume", "--seeds", "3"], "--seeds needs --questions"),
        (["--questions", "--seeds", "0"], "--seeds 0 must be at least 1"),
    ],
)
def test_flags_of_the_questions_need_them(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *flags]) == ExitCode.USAGE
    assert message in capsys.readouterr().err
