"""Keys and commands, over the chat."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from streamchat.config.keymap import KEYS, display_keys
from streamchat.frontend.slash.registry import SlashRegistry
from streamchat.tui.bindings import bind, hint
from streamchat.tui.widgets.keys import KeyTable

FIXED = (
    ("Up / Down", "on the first / last row: what you typed before"),
    ("@path", "the text of a file, wherever it stands in a message"),
    ("Shift+drag", "select by hand with the terminal's own selection"),
)


class HelpScreen(ModalScreen[None]):
    """Any of Esc, F1, q closes it."""

    CSS_PATH = "help.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        bind("help.close", "dismiss"),
    ]

    def __init__(self, registry: SlashRegistry, keys_of: Callable[[str], str]) -> None:
        super().__init__()
        self._registry, self._keys_of = registry, keys_of

    def compose(self) -> ComposeResult:
        """Two tables."""
        with VerticalScroll(id="help") as panel:
            panel.border_title = "Help"
            panel.border_subtitle = f"{hint(self.app, 'help.close').lower()} closes"
            yield Static("Keys", classes="section")
            yield KeyTable(self._rows())
            yield Static("Commands", classes="section")
            yield KeyTable([(f"/{c.name} {c.arguments}".rstrip(), c.help) for c in self._registry])
            yield Static("A message that begins with a command: double its slash, as in //help.", classes="note")
            yield Static("Faded messages have left the cache: the model no longer sees them.", classes="note")
            yield Static("Keys can be changed: [keys] in config.toml.", classes="note", markup=False)

    def _rows(self) -> list[tuple[str, str]]:
        """Keys as configured, and what is no key of ours."""
        told = [key for key in KEYS if key.scope == "chat" and key.id != "prompt.redo"]
        return [*((display_keys(self._keys_of(key.id)), key.help) for key in told), *FIXED]

    def on_mount(self) -> None:
        """Arrow keys scroll."""
        self.query_one("#help").focus()
