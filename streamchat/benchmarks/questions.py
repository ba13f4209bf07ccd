"""`streamchat bench --questions`: right answers to 40 simple questions, by sampling settings."""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from streamchat.base.errors import ConfigError
from streamchat.base.formatting import plural
from streamchat.base.progress import Progress
from streamchat.base.thinking import split
from streamchat.benchmarks.loading import about, heading, load_in_thread
from streamchat.config.loader import Configuration, check_value, parse_text
from streamchat.config.settings import Settings
from streamchat.conversation.assemble import assemble
from streamchat.conversation.conversation import Conversation
from streamchat.models.load import LoadedModel
from streamchat.reports.page import Page, Table

REPLY_TOKENS = 128
"""Maximum tokens per answer."""
EXCERPT = 120
"""Letters of a wrong reply that are kept."""
OFF: Mapping[str, Any] = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Values of sampling settings that a row does not name."""
DEFAULT_ROWS = (
    "temperature=0.7,top_p=0.9,repetition_penalty=1.1",
    "temperature=0.7,top_p=0.9",
    "temperature=0.2,repetition_penalty=1.1",
    "temperature=0.2",
    "temperature=0.2,top_p=0.9",
    "temperature=0.2,top_p=0.9,repetition_penalty=1.1",
    "temperature=0,repetition_penalty=1.1",
    "temperature=0",
)
"""What `--questions` compares without `--sampling`."""


@dataclass(frozen=True)
class Question:
    """A question with one short answer."""

    question: str
    answer: str
    """Regular expression, found in every right reply; case is ignored."""

    def is_answered_by(self, reply: str) -> bool:
        """Whether `reply` has the answer outside its reasoning."""
        return re.search(self.answer, split(reply)[1], re.IGNORECASE) is not None


@dataclass(frozen=True)
class QuestionFigures:
    """Results for one choice of settings."""

    settings: dict[str, Any]
    right: list[int]
    """Right answers, one number per seed."""
    wrong: dict[str, str]
    """Question -> the start of its first wrong reply."""
    cut: int
    """Answers that did not end by themselves."""
    mean_tokens: float
    seconds: float


@cache
def questions() -> tuple[Question, ...]:
    """Return the questions."""
    text = (resources.files("streamchat.benchmarks") / "questions.json").read_text(encoding="utf-8")
    return tuple(Question(**each) for each in json.loads(text))


def run(args: argparse.Namespace, configuration: Configuration, progress: Progress) -> Page:
    """Ask all questions with each choice of settings, each question in a new conversation.

    Raises:
        ConfigError: A row of settings is not valid.
        ModelError: The model cannot be loaded, or cannot stream.
    """
    rows = [parse_row(text) for text in args.sampling or DEFAULT_ROWS]
    loaded = load_in_thread(configuration, progress)
    settings = replace(configuration.settings, max_new_tokens=REPLY_TOKENS)
    configuration = replace(configuration, settings=settings)
    chat = assemble(configuration, loaded, lambda event: None, lambda *_: None).conversation
    figures = [ask_all(chat, row, args.seeds, progress) for row in rows]
    chat.close()
    return _page(loaded, figures, args.seeds)


def parse_row(text: str) -> dict[str, Any]:
    """Return the sampling settings of `temperature=0.2,top_p=0.9`; what it does not name is off.

    Raises:
        ConfigError: A name or a value is not valid.
    """
    given: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (each.strip() for each in part.partition("="))
        if not equals or name not in OFF:
            raise ConfigError(
                f"--sampling {part.strip()!r} must be NAME=VALUE with one of {', '.join(OFF)}; separate several with "
                "commas"
            )
        given[name] = check_value(name, parse_text(name, value, "--sampling"), "--sampling")
    return {**OFF, **given}


def ask_all(
    chat: Conversation, row: Mapping[str, Any], seeds: int, progress: Callable[[str], object]
) -> QuestionFigures:
    """Ask every question once per seed; once in all at temperature 0.

    Args:
        chat: A conversation; it is cleared before each question.
        row: Sampling settings.
        seeds: Number of seeds.
        progress: Called with progress messages.
    """
    started, right, wrong, tokens, cut = time.perf_counter(), list[int](), dict[str, str](), list[int](), 0
    for seed in range(seeds if row["temperature"] else 1):
        right.append(0)
        for number, question in enumerate(questions()):
            progress(f"{_describe(row)}: seed {seed}, question {number + 1} of {len(questions())}")
            outcome = ask(chat, replace(chat.settings, **row, seed=seed * len(questions()) + number), question)
            if question.is_answered_by(outcome.reply):
                right[-1] += 1
            else:
                wrong.setdefault(question.question, outcome.reply[:EXCERPT])
            tokens.append(outcome.new_tokens)
            cut += outcome.finish_reason != "stop"
    seconds = time.perf_counter() - started
    return QuestionFigures(dict(row), right, wrong, cut, statistics.mean(tokens), seconds)


def ask(chat: Conversation, settings: Settings, question: Question) -> Any:
    """Ask `question` in a cleared conversation; return the outcome of the turn."""
    chat.settings = settings
    chat.start_over(chat.encoder.format)
    chat.reseed()
    return chat.run_turn(question.question, lambda: False)


def _page(loaded: LoadedModel, figures: Sequence[QuestionFigures], seeds: int) -> Page:
    count = len(questions())
    rows = []
    for each in figures:
        mean = statistics.mean(each.right)
        rows.append(
            (
                _describe(each.settings),
                f"{mean:.1f}",
                ", ".join(map(str, each.right)),
                f"{each.cut / len(each.right):.1f}",
                f"{each.mean_tokens:.0f}",
                f"{each.seconds:.0f}",
            )
        )
    table = Table(
        f"Right answers to {count} questions",
        ("settings", "right", "by seed", "cut", "tokens", "s"),
        rows,
        f"right: mean over seeds; cut: answers per pass that did not end within {REPLY_TOKENS} tokens; tokens: mean "
        "per answer. What a row does not name is off. At temperature 0 the seed has no effect.",
    )
    lines = heading(loaded, plural(count, "question"), plural(seeds, "seed"))
    best = max(figures, key=lambda each: statistics.mean(each.right))
    data = about("bench", loaded, questions=count, seeds=seeds) | {
        "figures": [asdict(each) for each in figures],
        "best": best.settings,
    }
    notes = [*loaded.notes, f"Most right answers: {_describe(best.settings)}."]
    return Page("bench-questions", "Questions", lines, [table], notes=notes, data=data)


def _describe(row: Mapping[str, Any]) -> str:
    """Return `temperature 0.2, top_p 0.9`, without settings that are off."""
    return ", ".join(f"{name} {value:g}" for name, value in row.items() if name == "temperature" or value != OFF[name])
