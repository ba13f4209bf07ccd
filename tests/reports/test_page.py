"""Pages: what is aligned, and where the verdict is."""

from __future__ import annotations

import pytest

from streamchat.reports.machine import machine_line, processor, versions
from streamchat.reports.page import Page, Table, as_html, as_text, facts
from tools.evidence.markdown import as_markdown

TABLE = Table("T", ("name", "tokens", "end"), [("1", "1,024", "stop"), ("2", "-", "length"), ("3", "+4.5 MB", "")])


def test_columns_of_numbers_are_aligned_to_the_right() -> None:
    assert TABLE.numeric == [False, True, False]
    assert as_markdown(TABLE).splitlines()[1] == "| --- | ---: | --- |"
    assert Table("", ("a", "b"), []).numeric == [False, True]
    html = as_html(Page("p", "P", tables=[TABLE]))
    assert '<th class="n">tokens</th><th>end</th>' in html
    assert '<td>1</td><td class="n">1,024</td><td>stop</td>' in html


@pytest.mark.parametrize(("ok", "mark"), [(True, 'class="verdict"'), (False, 'class="verdict bad"')])
def test_the_verdict_is_the_last_line_and_a_badge(ok: bool, mark: str) -> None:
    page = Page(
        "p", "P", ["a line"], [facts("F", {"speed": "5 tok/s", "count": 3})], notes=["A note."], verdict="So.", ok=ok
    )
    lines = as_text(page, 80).splitlines()
    assert (lines[0], lines[-1]) == ("P", "So.")
    assert mark in as_html(page)
    assert mark not in as_html(Page("p", "P"))


def test_the_machine_is_named() -> None:
    line = machine_line()
    assert f"torch {versions()['torch']}" in line
    assert line.endswith(processor())
    assert "core" in processor()
