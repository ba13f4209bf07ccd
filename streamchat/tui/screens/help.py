"""Keys and commands, over the chat."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from streamchat.chat.slash import SlashRegistry
from streamchat.tui.widgets.keys import KeyTable

KEYS = (
    ("Enter", "send the message"),
    ("Ctrl+J", "new line, in every terminal (Shift+Enter, Alt+Enter where the terminal tells them)"),
    ("Up / Down", "on the first / last row: what you typed before"),
    ("Tab", "complete a command"),
    ("Esc", "stop the reply; take a waiting message back"),
    ("Ctrl+C", "copy the selection, else stop the reply, else press twice to quit"),
    ("Ctrl+Y", "copy the last reply (/copy code: its last code block)"),
    ("Shift+drag", "select by hand with the terminal's own selection"),
    ("PgUp / PgDn", "scroll; the view stays where you are"),
    ("End, Ctrl+End", "back to the end, and follow the reply"),
    ("Ctrl+B", "status panel on / off"),
    ("Ctrl+P", "command palette"),
    ("F1", "this help"),
    ("Ctrl+Q", "quit, at any moment (Ctrl+D in an empty input)"),
)


class HelpScreen(ModalScreen[None]):
    """Any of Esc, F1, q closes it."""

    CSS_PATH = "help.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,f1,q,enter", "dismiss", "Close", id="help.close", tooltip="Back to the chat"),
    ]

    def __init__(self, registry: SlashRegistry) -> None:
        super().__init__()
        self._registry = registry

    def compose(self) -> ComposeResult:
        """Two tables."""
        with VerticalScroll(id="help") as panel:
            panel.border_title = "Help"
            panel.border_subtitle = "esc closes"
            yield Static("Keys", classes="section")
            yield KeyTable(KEYS)
            yield Static("Commands", classes="section")
            yield KeyTable([(f"/{c.name} {c.arguments}".rstrip(), c.help) for c in self._registry])
            yield Static("A message that begins with a slash: double it, //like this.", classes="note")
            yield Static("Faded messages have left the cache: the model no longer sees them.", classes="note")

    def on_mount(self) -> None:
        """Arrow keys scroll."""
        self.query_one("#help").focus()
