"""Code that a model brings ends within its limits, on any thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from streamchat.conversation.template import rendering
from streamchat.conversation.template.bounded import LimitError, run_bounded
from streamchat.conversation.template.format import choose_format
from tests.support.models_help import make_tokenizer

FOR_EVER = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
DOUBLING = (
    "{% set n = namespace(x='x' * 1000000) %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
)


def render(template: str) -> str:
    return ImmutableSandboxedEnvironment().from_string(template).render()


def test_what_ends_is_returned() -> None:
    assert run_bounded(lambda: render("{{ 'a' * 3 }}")) == "aaa"


def test_errors_of_the_work_come_through() -> None:
    with pytest.raises(ZeroDivisionError):
        run_bounded(lambda: 1 // 0)


def test_a_template_that_loops_is_stopped() -> None:
    before = threading.active_count()
    start = time.monotonic()
    with pytest.raises(LimitError, match=r"did not finish within 0\.3 s"):
        run_bounded(lambda: render(FOR_EVER), seconds=0.3)
    assert time.monotonic() - start < 30
    assert threading.active_count() == before  # it does not go on in the background


def test_a_template_that_allocates_is_stopped() -> None:
    with pytest.raises(LimitError, match="more than 100 MB of memory"):
        run_bounded(lambda: render(DOUBLING), seconds=60, growth_bytes=100_000_000)


def test_it_works_on_a_thread_that_is_not_the_main_one() -> None:
    with ThreadPoolExecutor(1) as pool, pytest.raises(LimitError, match="did not finish within"):
        pool.submit(run_bounded, lambda: render(FOR_EVER), seconds=0.3).result()


@pytest.mark.parametrize(("template", "words"), [(FOR_EVER, "did not finish within"), (DOUBLING, "MB of memory")])
def test_such_a_template_is_left_for_plain_lines_at_once(
    template: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    seconds = 60.0 if "memory" in words else 0.3

    def counted(work: Callable[[], str]) -> str:
        calls.append(work)
        return run_bounded(work, seconds=seconds, growth_bytes=100_000_000)

    monkeypatch.setattr(rendering, "run_bounded", counted)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    found = choose_format(tokenizer, "auto", "")
    assert found.name == "plain"
    assert words in found.notes[0]
    assert len(calls) == 1  # what is rendered later would take as long each time


def test_a_template_that_writes_far_too_much_is_left_for_plain_lines() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] * 1000000 }}"
    found = choose_format(tokenizer, "auto", "")
    assert found.name == "plain"
    assert "characters for 1 messages" in found.notes[0]
