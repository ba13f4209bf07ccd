"""Code that a model brings ends within its limits, on any thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from streamchat.conversation.template import rendering
from streamchat.conversation.template.bounded import LimitError, TimeLimit, run_bounded
from streamchat.conversation.template.format import choose_format
from tests.support.models_help import make_tokenizer

FOR_EVER = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
ALLOCATING = (  # 1 GB in values that are not huge, which stay until it is stopped
    "{% set n = namespace(x=[]) %}{% for i in range(1000) %}{% set n.x = n.x + ['x' * 1000000 ~ i] %}{% endfor %}"
    + FOR_EVER
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


def busy(seconds: float) -> int:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
    return 7


def slow() -> int:
    time.sleep(0.3)
    return 7


@pytest.mark.parametrize("knows_cpu_time", [True, False])
def test_several_pieces_of_work_are_limited_together(knows_cpu_time: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not knows_cpu_time:
        monkeypatch.delattr(time, "pthread_getcpuclockid", raising=False)
    limit = TimeLimit(0.5)
    while limit.used < 0.3:
        assert run_bounded(lambda: busy(0.2), in_all=limit) == 7
    with pytest.raises(LimitError, match="did not finish within"):
        run_bounded(lambda: busy(60), in_all=limit)
    assert limit.left == 0


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="the CPU time of another thread is unknown here")
def test_only_cpu_time_counts() -> None:
    """The process may be stopped for a while, with Ctrl+Z for example, or get little of a busy processor."""
    assert run_bounded(slow, seconds=0.1) == 7


def test_a_stopped_process_is_not_a_slow_template(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(time, "pthread_getcpuclockid", raising=False)
    real, jumps = time.monotonic, iter([0, 0, 100])
    offset = 0

    def jumping() -> float:
        nonlocal offset
        offset += next(jumps, 0)
        return real() + offset

    monkeypatch.setattr(time, "monotonic", jumping)
    assert run_bounded(lambda: busy(0.1)) == 7
    assert offset == 100


def test_a_template_that_allocates_is_stopped() -> None:
    with pytest.raises(LimitError, match="more than 100 MB of memory"):
        run_bounded(lambda: render(ALLOCATING), seconds=60, growth_bytes=100_000_000)


def test_it_works_on_a_thread_that_is_not_the_main_one() -> None:
    with ThreadPoolExecutor(1) as pool, pytest.raises(LimitError, match="did not finish within"):
        pool.submit(run_bounded, lambda: render(FOR_EVER), seconds=0.3).result()


@pytest.mark.parametrize(("template", "words"), [(FOR_EVER, "did not finish within"), (ALLOCATING, "MB of memory")])
def test_such_a_template_is_left_for_plain_lines_at_once(
    template: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    seconds = 60.0 if "memory" in words else 0.3

    def counted(work: Callable[[], str], **_: object) -> str:
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
    tokenizer.chat_template = "{% for i in range(2000) %}{{ messages[0]['content'] * 100 }}{% endfor %}"
    found = choose_format(tokenizer, "auto", "")
    assert found.name == "plain"
    assert "characters for 1 messages" in found.notes[0]
