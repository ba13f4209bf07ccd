"""How a reply is laid out: lines stay lines, and a streamed paragraph has the screen laid out only when it grows."""

from __future__ import annotations

import re

import pytest
from textual.app import App, ComposeResult
from textual.widgets import Markdown

from streamchat.tui.widgets.reply import Paragraph, ReplyMarkdown


class Page(App[None]):
    """One document."""

    def compose(self) -> ComposeResult:
        """Only that."""
        yield ReplyMarkdown()


async def test_a_paragraph_is_laid_out_anew_only_where_it_grows() -> None:
    app = Page()
    laid_out = 0

    def count(_: object) -> None:
        nonlocal laid_out
        laid_out += 1

    async with app.run_test(size=(40, 20)) as pilot:
        document = app.query_one(ReplyMarkdown)
        await document.append("word")
        await pilot.pause()
        app.screen.screen_layout_refresh_signal.subscribe(app, count)
        for _ in range(3):
            await document.append(" word")
            await pilot.pause()
        assert laid_out == 0
        assert app.query_one(Paragraph).size.height == 1
        for _ in range(16):
            await document.append(" word")
            await pilot.pause()
        assert laid_out == 2
        paragraph = app.query_one(Paragraph)
        # 20 words of 5 cells, 7 to a line of 36 or 38
        assert paragraph.size.height == 3
        shown = "".join(strip.text for strip in paragraph.render_lines(paragraph.size.region))
        assert shown.split() == ["word"] * 20


LINES = [
    ("Roses are red,\nViolets are blue", ["Roses are red,", "Violets are blue"]),
    ("*Roses* are\n**red**,\n`x`", ["Roses are", "red,", "x"]),
    ("- one\n  and more\n- two", ["• one", "and more", "• two"]),
    ("> quoted\n> lines", ["quoted", "lines"]),
    ("```\na\n  b\n```", ["a", "b"]),
    ("| a | b |\n|---|---|\n| 1 | 2 |", ["a", "b", "1", "2"]),
    ("one  \ntwo\\\nthree", ["one", "two", "three"]),
    ("1. one\n2. two\n   - in\n   - out\n3. three", ["1. one", "2. two", "• in", "• out", "3. three"]),
    ("\n".join(f"{n}. x" for n in range(8, 12)), ["8. x", "9. x", "10. x", "11. x"]),
    ("> one\n>\n> - two\n> - three\n>\n> four", ["one", "• two", "• three", "four"]),
    ("12 Main Street\nSpringfield\n\nDear all,", ["12 Main Street", "Springfield", "Dear all,"]),
]


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True], ids=["at once", "streamed"])
@pytest.mark.parametrize(("text", "lines"), LINES)
async def test_a_line_is_a_line(text: str, lines: list[str], streamed: bool) -> None:
    app = Page()
    async with app.run_test(size=(60, 20)) as pilot:
        document = app.query_one(ReplyMarkdown)
        if streamed:
            stream = Markdown.get_stream(document)
            for letter in text:
                await stream.write(letter)
                await pilot.pause()
            await stream.stop()
        else:
            await document.update(text)
        await pilot.pause()
        shown = [re.sub("[─-╿▌▔▁]", " ", row.text).strip() for row in app.screen._compositor.render_strips()]
        rows = [cell for row in shown for cell in (row.split() if "|" in text else [row]) if cell]
        assert rows == lines
