"""A streamed reply looks like the same text rendered at once: at its end, and as far as possible before."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from textual.app import App, ComposeResult
from textual.pilot import Pilot
from textual.widgets._markdown import MarkdownFence, MarkdownHeader, MarkdownHorizontalRule

from streamchat.tui.widgets.growing import OrderedList
from streamchat.tui.widgets.reply import Reply, ReplyMarkdown

WORDS = [
    *("alpha", "beta", "gamma", "**bold**", "*em*", "`code`", "[link](https://example.org)", "~~old~~"),
    *("你好世界", "🙂"),
    *("naïve", "&amp;", "<b>x</b>", "a_b_c", "1.", "-", "#", ">", "|", "2*3", "\\*", "averyveryverylongwordthatfolds"),
]
KINDS = ["text", "lines", "heading", "rule", "code", "table", "quote", "list", "list", "list"]


class Page(App[None]):
    """Replies, one at a time."""

    def compose(self) -> ComposeResult:
        """The first one."""
        yield Reply("model")

    @property
    def reply(self) -> Reply:
        return self.query_one(Reply)

    @property
    def document(self) -> ReplyMarkdown:
        return self.query_one(ReplyMarkdown)

    @property
    def rows(self) -> list[str]:
        return [row.text.rstrip() for row in self.screen._compositor.render_strips()]


async def settle(pilot: Pilot[None]) -> None:
    await pilot.pause()
    await pilot.pause()


async def rendered(app: Page, pilot: Pilot[None], text: str) -> list[str]:
    """What `text` looks like in a new reply that is not streamed."""
    await app.reply.remove()
    await app.mount(Reply("model"))
    await app.reply.finish(text)
    await settle(pilot)
    return app.rows


async def stream(app: Page, pilot: Pilot[None], pieces: Iterator[str], every: int = 1) -> None:
    """Append `pieces` to the document; a frame is drawn after `every` of them."""
    for number, piece in enumerate(pieces, 1):
        await app.reply.add(piece)
        if number % every == 0:
            await pilot.pause()
    stream = app.reply._stream
    if stream is not None:
        await stream.stop()
        app.reply._stream = None
    await settle(pilot)


# --- random documents -----------------------------------------------------------------------------------------------


class Documents:
    """Random Markdown."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def line(self, words: int = 8) -> str:
        return " ".join(self._random.choices(WORDS, k=self._random.randint(1, words)))

    def block(self, depth: int = 0) -> str:
        match self._random.choice(
            ["text", "lines", "heading", "rule", "code", "table", "quote", "list", "list", "list"]
        ):
            case "lines":
                return f"{self.line()}\n{self.line()}"
            case "heading":
                return f"{'#' * self._random.randint(1, 6)} {self.line(4)}"
            case "rule":
                return self._random.choice(["---", "***", "___"])
            case "code":
                return f"```python\n{self.line(4)}\n    {self.line(4)}\n\nx = 1\n```"
            case "table":
                row = f"| {self.line(2).replace('|', '')} | {self.line(2).replace('|', '')} |"
                return "\n".join([row, "|---|---|", *[row] * self._random.randint(1, 3)])
            case "quote":
                return "\n".join(f"> {line}".rstrip() for line in self.inner(depth).split("\n"))
            case "list":
                return self.list_(depth)
        return self.line(20)

    def inner(self, depth: int) -> str:
        return self.block(depth + 1) if depth < 2 else self.line()

    def list_(self, depth: int) -> str:
        ordered = self._random.random() < 0.5
        items = []
        for number in range(1, self._random.randint(2, 4)):
            mark = f"{number}. " if ordered else "- "
            item = self.line(5) if self._random.random() < 0.5 else f"{self.line(4)}\n\n{self.inner(depth)}"
            items.append(mark + item.replace("\n", "\n" + " " * len(mark)))
        return self._random.choice(["\n", "\n\n"]).join(items)

    def document(self) -> str:
        blocks = [self.block() for _ in range(self._random.randint(1, 4))]
        return "\n\n".join([*blocks, "The end."])[:600]

    def pieces(self, text: str) -> Iterator[str]:
        size, at = self._random.choice([1, 3, 8, 30]), 0
        while at < len(text):
            length = self._random.randint(1, size)
            yield text[at : at + length]
            at += length


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
async def test_a_streamed_reply_looks_like_the_same_text_rendered_at_once(seed: int) -> None:
    documents = Documents(seed)
    app = Page()
    async with app.run_test(size=(44, 110)) as pilot:
        text = documents.document()
        await stream(app, pilot, documents.pieces(text), every=random.Random(seed).choice([1, 5, 10]))
        streamed = app.rows
        await app.reply.finish(text)
        await settle(pilot)
        finished = app.rows
        fresh = await rendered(app, pilot, text)
        assert finished == fresh, text
        assert streamed == fresh, text


# --- what each mechanism is for -------------------------------------------------------------------------------------


async def test_a_rule_in_a_list_or_quote_is_shown_once_and_in_its_place() -> None:
    text = "- one\n\n  ***\n- two\n\n> three\n>\n> ---\n>\n> four"
    app = Page()
    async with app.run_test(size=(40, 30)) as pilot:
        await stream(app, pilot, iter(text))
        assert len(app.query(MarkdownHorizontalRule)) == 2
        shown = [row.strip(" ▌•") for row in app.rows if row.strip(" ▌•")]
        kinds = [row if row.isalpha() else "rule" for row in shown]
        assert kinds == ["model", "one", "rule", "two", "three", "rule", "four"]


async def test_a_link_whose_address_follows_is_a_link_at_the_end() -> None:
    text = "See [the page][a] and [b].\n\nMore.\n\n[a]: https://example.org\n[b]: https://example.com\n"
    app = Page()
    async with app.run_test(size=(60, 20)) as pilot:
        await stream(app, pilot, iter(text))
        await app.reply.finish(text)
        await settle(pilot)
        shown = " ".join("\n".join(app.rows).split())
        assert "See the page (https://example.org) and b (https://example.com)." in shown
        assert "[" not in "\n".join(app.rows)


@pytest.mark.parametrize("text", ["Such as:\n- one\n- two\n", "A line\n=> and another\n", "Row\n--flag\n"])
async def test_a_paragraph_is_no_heading_before_the_next_line_is_known(text: str) -> None:
    app = Page()
    async with app.run_test(size=(40, 20)) as pilot:
        for letter in text:
            await app.document.append(letter)
            await pilot.pause()
            assert not app.query(MarkdownHeader)


async def test_the_next_number_continues_a_list() -> None:
    text = "1. one\n\n2. two\n   - in\n\n3. three\n\n10. end"
    app = Page()
    async with app.run_test(size=(40, 20)) as pilot:
        await stream(app, pilot, iter(text))
        assert len(app.query(OrderedList)) == 1


@pytest.mark.parametrize("end", ["\n42", "\n\n7.", "\n\n-", "\n\n---", "\n\n> ", "\n\n**", "\n```"])
async def test_the_last_line_is_shown_at_the_end_of_a_reply_whatever_it_is(end: str) -> None:
    app = Page()
    async with app.run_test(size=(40, 20)) as pilot:
        text = "The answer:" + end
        await stream(app, pilot, iter(text))
        await app.reply.finish(text)
        await settle(pilot)
        finished = app.rows
        assert app.document.source == text
        assert finished == await rendered(app, pilot, text)


async def test_a_reply_that_looks_right_is_not_rendered_again_at_its_end() -> None:
    text = "# One\n\nTwo [x](https://example.org)\n\n- three\n  1. four\n\n> five\n\n"
    text += "```python\nx = 6\n```\n\n|a|b|\n|-|-|\n|c|d|\n"
    app = Page()
    async with app.run_test(size=(40, 40)) as pilot:
        await stream(app, pilot, iter(text))
        before = list(app.document.walk_children())
        await app.reply.finish(text)
        await settle(pilot)
        assert list(app.document.walk_children()) == before


async def test_a_code_block_that_was_left_blank_is_rendered_at_the_end() -> None:
    text = "```\nx = 1\n```\n"
    app = Page()
    async with app.run_test(size=(40, 10)) as pilot:
        await stream(app, pilot, iter(text))
        app.query_one(MarkdownFence).query_one("#code-content").update("")  # type: ignore[attr-defined]
        await app.reply.finish(text)
        await settle(pilot)
        assert "x = 1" in "\n".join(app.rows)
