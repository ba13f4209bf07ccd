"""Code that a model brings ends within its limits, on any thread."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from streamchat.chat.bounded import LimitError, run_bounded

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
    with pytest.raises(LimitError, match=r"not done after 0\.3 s"):
        run_bounded(lambda: render(FOR_EVER), seconds=0.3)
    assert time.monotonic() - start < 30
    assert threading.active_count() == before  # it does not go on in the background


def test_a_template_that_allocates_is_stopped() -> None:
    with pytest.raises(LimitError, match="more than 100 MB of memory"):
        run_bounded(lambda: render(DOUBLING), seconds=60, growth_bytes=100_000_000)


def test_it_works_on_a_thread_that_is_not_the_main_one() -> None:
    with ThreadPoolExecutor(1) as pool, pytest.raises(LimitError, match="not done after"):
        pool.submit(run_bounded, lambda: render(FOR_EVER), seconds=0.3).result()
