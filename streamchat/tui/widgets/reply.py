"""The model's reply, streamed as Markdown."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from markdown_it.token import Token
from textual.await_complete import AwaitComplete
from textual.containers import Vertical
from textual.content import Content, Span
from textual.geometry import Size
from textual.style import Style
from textual.widgets import Markdown
from textual.widgets._markdown import MarkdownBlock, MarkdownHorizontalRule, MarkdownParagraph
from textual.widgets.markdown import MarkdownFence, MarkdownStream

from streamchat.base.sanitize import PrintableStream, printable
from streamchat.base.thinking import ONLY_REASONING, Part, ThinkingStream, split
from streamchat.config.settings import Thinking as ShowThinking
from streamchat.frontend.terminal_codes import find_addresses, supports_osc
from streamchat.tui.widgets.backdrop import Column
from streamchat.tui.widgets.growing import BulletList, Growing, OrderedList, Quote
from streamchat.tui.widgets.one_layout import OneLayout
from streamchat.tui.widgets.rendered import show_same
from streamchat.tui.widgets.text import Verbatim
from streamchat.tui.widgets.thinking import Thinking

if TYPE_CHECKING:
    from textual.css.styles import RulesMap

OPEN_LINE = re.compile(r"[ \t>]*([-=*+_#`~|:]+|\d{1,9}[.)]?)?[ \t]*")
"""The start of a line that more text can turn into something else.

For example, `-` below a paragraph makes it a heading until it becomes `- item`, and `2` after a list is a paragraph
until it becomes `2. item`; the item would then start another list.
"""
NESTED_RULE = "nested_hr"
"""Type of the token of a horizontal rule in a list or quote."""
LINKS = ("http://", "https://", "mailto:")


def make_parser() -> MarkdownIt:
    """A parser for GitHub-flavored Markdown, with two differences.

    HTML is shown as text, so that `<think>` or `<div>` do not disappear. Line breaks are kept, as in the prompt, where
    standard Markdown would join the lines of a paragraph.
    """
    parser = MarkdownIt("gfm-like", {"html": False})
    parser.core.ruler.push("lines", _keep_lines)
    parser.core.ruler.push("rules", _keep_rules)
    parser.core.ruler.push("addresses", _show_addresses)
    return parser


def _show_addresses(state: StateCore) -> None:
    """Show the address of each link whose text is not the address, so that no reply can hide where a link leads."""
    for token in state.tokens:
        if token.children and any(child.type == "link_open" for child in token.children):
            token.children = list(_with_addresses(token.children))


def _with_addresses(children: list[Token]) -> Iterator[Token]:
    href, shown = "", ""
    for child in children:
        yield child
        if child.type == "link_open":
            href, shown = str(child.attrs.get("href", "")), ""
        elif child.type == "link_close":
            if shown.strip() not in (href, href.removeprefix("mailto:"), href.partition("://")[2].removesuffix("/")):
                yield Token("text", "", 0, content=f" ({href})")
        else:
            shown += child.content


def _keep_lines(state: StateCore) -> None:
    for token in state.tokens:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"


def _keep_rules(state: StateCore) -> None:
    """Rename rules in lists and quotes: Textual would show them before the list, again for each new word."""
    for token in state.tokens:
        if token.type == "hr" and token.level > 0:
            token.type = NESTED_RULE


class Fence(Growing, OneLayout, MarkdownFence):
    """A code block. Without a language it is plain text; guessing would cost time for every token."""

    @classmethod
    def highlight(cls, code: str, language: str, ansi: bool = False, dark: bool = False) -> Content:
        """The highlighted code."""
        return super().highlight(code, language or "text", ansi, dark)

    async def grow(self, block: MarkdownBlock) -> bool:
        """Show `block`, with more code."""
        assert isinstance(block, Fence)
        if (block.code, block.lexer) != (self.code, self.lexer):
            self._copy_context(block)
            self.set_content(block._highlighted_code)
        return True


class Paragraph(Growing, OneLayout, MarkdownParagraph):
    """A paragraph that triggers a new layout only when its height changes, not for every word."""

    def set_content(self, content: Content) -> None:
        """Show `content`."""
        width, height = self.content_size
        # as in Widget.get_content_height; the styles behave like a RulesMap
        same = self.is_mounted and bool(width) and content.get_height(cast("RulesMap", self.styles), width) == height
        self._content = content
        # mounting requests a layout; another request, from before, would cause a second one right after it
        self.update(content, layout=self.is_mounted and not same)

    def _token_to_content(self, token: Token) -> Content:
        """Return the text with web addresses as links of the terminal (OSC 8), too; their targets are their texts."""
        content = super()._token_to_content(token)
        text = content.plain
        if "://" not in text or not supports_osc(os.environ):
            return content
        spans = [Span(start, end, Style(link=text[start:end])) for start, end in find_addresses(text)]
        return content.add_spans(spans) if spans else content

    async def grow(self, block: MarkdownBlock) -> bool:
        """Show `block`, with more text."""
        if not self._content.is_same(block._content):
            self.set_content(block._content)
        self._copy_context(block)
        return True


class ReplyMarkdown(Column, OneLayout, Markdown):
    """Markdown that opens only web links."""

    BLOCKS = {  # noqa: RUF012 - as in the base class
        **Markdown.BLOCKS,
        "fence": Fence,
        "code_block": Fence,
        "paragraph_open": Paragraph,
        "bullet_list_open": BulletList,
        "ordered_list_open": OrderedList,
        "blockquote_open": Quote,
    }

    def __init__(self) -> None:
        super().__init__(parser_factory=make_parser, open_links=False)
        self._held = ""
        """The text that is not appended yet."""

    def unhandled_token(self, token: Token) -> MarkdownBlock | None:
        """Return the block of a token that Textual does not know."""
        return MarkdownHorizontalRule(self, token) if token.type == NESTED_RULE else None

    def append(self, markdown: str) -> AwaitComplete:
        """Append text, except for an unfinished last line whose meaning is still open (see `OPEN_LINE`)."""
        text = self._held + markdown
        start = text.rfind("\n") + 1
        begun = start == 0 and bool(self.source) and not self.source.endswith("\n")
        if begun or not OPEN_LINE.fullmatch(text, start):
            start = len(text)
        self._held = text[start:]
        return super().append(text[:start]) if start else AwaitComplete()

    async def complete(self, text: str) -> None:
        """Show the whole document `text`; changes nothing if what was appended looks the same.

        What is appended is parsed without most of what is before it, so a link reference, for example, is not known.
        """
        if self._held:
            held, self._held = self._held, ""
            await super().append(held)
        if self.source != text or not show_same(self.children, self._parsed(text)):
            await self.update(text)

    def _parsed(self, text: str) -> list[MarkdownBlock]:
        return list(self._parse_markdown(make_parser().parse(text)))

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """Return the rows of the blocks, without the margin below the last one."""
        return max(0, super().get_content_height(container, viewport, width) - 1)

    def on_markdown_link_clicked(self, event: Markdown.LinkClicked) -> None:
        """Open web and mail links only; a model may generate any link."""
        event.stop()
        if event.href.startswith(LINKS):
            self.app.open_url(event.href)
        else:
            self.app.notify(f"not a web link: {printable(event.href)}", markup=False)


class Reply(Column, OneLayout, Vertical):
    """The model's reply. Call `add` while it is generated, then `finish`.

    Args:
        model: Name of the model, for the heading.
        thinking: How reasoning is displayed.
    """

    def __init__(self, model: str, thinking: ShowThinking = "collapse") -> None:
        super().__init__(Verbatim(model, classes="heading"), ReplyMarkdown())
        self._mode = thinking
        self._printable = PrintableStream()
        self._parts = ThinkingStream()
        self._stream: MarkdownStream | None = None
        self._thoughts: Thinking | None = None
        self.raw = ""
        """The complete reply, including reasoning."""
        self.text = ""
        """The answer as shown, without reasoning."""

    async def add(self, text: str) -> None:
        """Append text."""
        await self._write(self._parts.feed(_lines(self._printable.feed(text))))
        self.raw += text

    async def finish(self, text: str) -> None:
        """Show the complete reply `text`."""
        await self._write([*self._parts.feed(_lines(self._printable.end())), *self._parts.end()])
        self.raw = text
        if self._stream is not None:
            await self._stream.stop()
            self._stream = None
        thoughts, answer = split(_lines(printable(text)))
        if thoughts and self._thoughts is None:  # restored, not streamed
            await self._think(thoughts)
        if self._thoughts is not None:
            self._thoughts.finish()
        elif thoughts and not answer:  # hidden
            await self.mount(Verbatim(ONLY_REASONING, classes="only-thought"))
        self.text = answer
        await self.query_one(ReplyMarkdown).complete(answer)

    async def _write(self, parts: list[Part]) -> None:
        for part in parts:
            if part.kind == "thought":
                await self._think(part.text)
                continue
            if self._thoughts is not None:
                self._thoughts.finish()
            self.text += part.text
            if self._stream is None:
                self._stream = Markdown.get_stream(self.query_one(ReplyMarkdown))
            await self._stream.write(part.text)

    async def _think(self, text: str) -> None:
        if self._mode == "hide":
            return
        if self._thoughts is None:
            self._thoughts = Thinking(unfolded=self._mode == "show")
            await self.mount(self._thoughts, before=self.query_one(ReplyMarkdown))
        self._thoughts.add(text)


def _lines(text: str) -> str:
    """Replace Unicode line separators by `\\n`; Textual and its parser treat them differently."""
    return text.replace("\u2028", "\n").replace("\u2029", "\n")
