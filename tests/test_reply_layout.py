"""A streamed paragraph has the screen laid out when it grows by a line, and not at every word."""

from __future__ import annotations

from textual.app import App, ComposeResult

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
        assert 2 <= laid_out < 10
        paragraph = app.query_one(Paragraph)
        # 20 words of 5 cells, 7 to a line of 36 or 38
        assert paragraph.size.height == 3
        shown = "".join(strip.text for strip in paragraph.render_lines(paragraph.size.region))
        assert shown.split() == ["word"] * 20
