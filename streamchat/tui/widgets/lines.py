"""Conversation widgets other than turns: notices, command output, system prompt, welcome, failure."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Vertical

from streamchat import __version__
from streamchat.base.events import EngineFailed, ModelReady, TokensEvicted
from streamchat.base.sanitize import one_line
from streamchat.frontend.messages import cache_capacity, eviction_sentence, model_facts
from streamchat.frontend.presenter import merge_evictions
from streamchat.tui.bindings import hint
from streamchat.tui.widgets.text import Folded, Verbatim


class Line(Verbatim):
    """A notice, with CSS class `-info`, `-warning` or `-error`."""

    def __init__(self, text: str, level: str = "info") -> None:
        super().__init__(text, classes=f"-{level}")


class EvictionLine(Verbatim):
    """An eviction notice; consecutive evictions are merged.

    Args:
        event: The eviction; only its sentence if no other one is merged.
        after: Whether it happened after the reply started.
    """

    def __init__(self, event: TokensEvicted | str, *, after: bool = False) -> None:
        self._event = None if isinstance(event, str) else event
        self.sentence = event if isinstance(event, str) else eviction_sentence(event)
        super().__init__(f"┄ {self.sentence}", classes="-after" if after else None)

    def add(self, event: TokensEvicted) -> None:
        """Merge another eviction into this line."""
        self._event = merge_evictions(self._event, event)
        self.sentence = eviction_sentence(self._event)
        self.show(f"┄ {self.sentence}")


class RecallLine(Verbatim):
    """Which evicted turns are back in context for a reply."""

    def __init__(self, sentence: str) -> None:
        super().__init__(f"↩ {sentence}")


class CommandOutput(Vertical):
    """A slash command above its output."""

    def __init__(self, command: str, text: str) -> None:
        self.text = text
        output = [Folded(text, lines=60, classes="output")] if text else []
        super().__init__(Verbatim(f"› {one_line(command)}", classes="command"), *output)


class SystemPrompt(Vertical):
    """The system prompt, which is never evicted: a heading above the folded text."""

    def __init__(self, text: str) -> None:
        self.text = text
        heading = Verbatim("System prompt · pinned, never evicted", classes="heading")
        super().__init__(heading, Folded(text, lines=3, classes="body"))


class Welcome(Vertical):
    """The loaded model and first steps."""

    def __init__(self, event: ModelReady) -> None:
        super().__init__()
        self._event = event

    def compose(self) -> ComposeResult:
        """Model figures and key hints."""
        yield Verbatim(f"streamchat {__version__}", classes="heading")
        yield Verbatim(model_facts(self._event), classes="facts")
        yield Verbatim(
            f"{cache_capacity(self._event.info)} The oldest messages are evicted and shown faded.", classes="hint"
        )
        send, newline, help_, leave = (
            hint(self.app, key_id) for key_id in ("prompt.send", "prompt.newline", "app.help", "app.quit")
        )
        yield Verbatim(f"{send} sends · {newline} new line · / commands · {help_} help · {leave} quits", classes="hint")


class FailurePanel(Vertical):
    """Why the engine failed, and what to do."""

    def __init__(self, event: EngineFailed, log: str) -> None:
        super().__init__()
        self.event, self._log = event, log

    def compose(self) -> ComposeResult:
        """Title, message, hints."""
        yield Verbatim(one_line(self.event.title), classes="heading")
        yield Verbatim(one_line(self.event.message), classes="body")
        yield Verbatim(
            f"{hint(self.app, 'app.quit')} quits (exit code {self.event.exit_code}) · log: {self._log}", classes="hint"
        )
