"""A reply of the model, streamed as Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Markdown
from textual.widgets._markdown import MarkdownParagraph
from textual.widgets.markdown import MarkdownFence, MarkdownStream

from streamchat.base.sanitize import PrintableStream, printable
from streamchat.base.thinking import ONLY_REASONING, Part, ThinkingStream, split
from streamchat.config.settings import Thinking as ShowThinking
from streamchat.tui.widgets.text import Verbatim
from streamchat.tui.widgets.thinking import Thinking

if TYPE_CHECKING:
    from textual.css.styles import RulesMap

LINKS = ("http://", "https://", "mailto:")


def make_parser() -> MarkdownIt:
    """Markdown as GitHub reads it, with two differences.

    HTML is text: `<think>` or `<div>` in a reply must not vanish. And a line is a line, as in verse and addresses, and
    as the prompt shows it: Markdown proper would join the lines of a paragraph.
    """
    parser = MarkdownIt("gfm-like", {"html": False})
    parser.core.ruler.push("lines", _keep_lines)
    return parser


def _keep_lines(state: StateCore) -> None:
    for token in state.tokens:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"


class Fence(MarkdownFence):
    """A code block. One that names no language is plain; guessing would cost time at every token."""

    @classmethod
    def highlight(cls, code: str, language: str, ansi: bool = False, dark: bool = False) -> Content:
        """The code, coloured."""
        return super().highlight(code, language or "text", ansi, dark)


class Paragraph(MarkdownParagraph):
    """A paragraph that lets the screen be laid out anew only when it grows by a line, not at every word."""

    def set_content(self, content: Content) -> None:
        """Show `content`."""
        width, height = self.content_size
        # as Widget.get_content_height asks for it; the styles answer as a mapping of rules does
        same = self.is_mounted and bool(width) and content.get_height(cast("RulesMap", self.styles), width) == height
        self._content = content
        self.update(content, layout=not same)


class ReplyMarkdown(Markdown):
    """Markdown whose links open only where they lead to the web."""

    BLOCKS = {  # noqa: RUF012 - as the base class has it
        **Markdown.BLOCKS,
        "fence": Fence,
        "code_block": Fence,
        "paragraph_open": Paragraph,
    }

    def __init__(self) -> None:
        super().__init__(parser_factory=make_parser, open_links=False)

    def on_markdown_link_clicked(self, event: Markdown.LinkClicked) -> None:
        """A model may write any link; only those that open a browser are followed."""
        event.stop()
        if event.href.startswith(LINKS):
            self.app.open_url(event.href)
        else:
            self.app.notify(f"not a web link: {printable(event.href)}", markup=False)


class Reply(Vertical):
    """The model's answer. `add` text while it is written, then `finish`.

    Args:
        model: Its name, as heading.
        thinking: What is shown of its reasoning.
    """

    def __init__(self, model: str, thinking: ShowThinking = "collapse") -> None:
        super().__init__()
        self._model, self._mode = model, thinking
        self._printable = PrintableStream()
        self._parts = ThinkingStream()
        self._stream: MarkdownStream | None = None
        self._thoughts: Thinking | None = None
        self.raw = ""
        """All that came, reasoning included."""
        self.text = ""
        """The answer, as it was shown."""

    def compose(self) -> ComposeResult:
        """The name over the text."""
        yield Verbatim(self._model, classes="heading")
        yield ReplyMarkdown()

    async def add(self, text: str) -> None:
        """Show more text."""
        await self._write(self._parts.feed(_lines(self._printable.feed(text))))
        self.raw += text

    async def finish(self, text: str) -> None:
        """The reply is over and is `text`."""
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
        if answer != self.text or "```" in answer or "~~~" in answer:
            # a fence that was drawn piece by piece can end up blank
            self.text = answer
            await self.query_one(ReplyMarkdown).update(answer)

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
    """Only `\\n` ends a line; Textual and its parser disagree about the other separators."""
    return text.replace("\u2028", "\n").replace("\u2029", "\n")
