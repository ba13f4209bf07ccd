"""The help screen: keys and commands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.geometry import Size
from textual.screen import ModalScreen
from textual.widget import Widget
from textual.widgets import Static

from streamchat.base.sanitize import printable
from streamchat.config.keymap import KEYS, display_keys
from streamchat.frontend.slash.registry import SlashRegistry
from streamchat.tui.bindings import bind, hint
from streamchat.tui.screens.closable import Closable

FIXED = (
    ("Up / Down", "on the first / last row: previous / next input; queued messages come first"),
    ("Enter", "in an empty input: send the held messages"),
    ("@path", "insert the text of a file, anywhere in a message"),
    ("Shift+drag", "use the terminal's own selection"),
)


class KeyTable(Widget):
    """Keys or commands on the left, their descriptions on the right.

    One widget, because Textual styles and places each widget by itself.
    """

    KEYS_WIDTH = 21
    """Of the column on the left, in cells, with the space after it."""

    def __init__(self, rows: Iterable[tuple[str, str]]) -> None:
        super().__init__()
        self._rows = [(Content(printable(key)).stylize("bold"), Content(printable(text))) for key, text in rows]

    def render(self) -> Content:
        """The rows."""
        return Content("\n").join(self._lines(self.content_size.width))

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """The number of lines at this width."""
        return len(self._lines(width))

    def _lines(self, width: int) -> list[Content]:
        lines: list[Content] = []
        for row in self._rows:
            keys, texts = (
                cell.wrap(max(1, columns))
                for cell, columns in zip(row, (self.KEYS_WIDTH, width - self.KEYS_WIDTH), strict=True)
            )
            for key, text in zip_longest(keys, texts, fillvalue=Content("")):
                lines.append(key.rstrip().pad_right(self.KEYS_WIDTH - key.rstrip().cell_length) + text)
        return lines


class HelpScreen(Closable, ModalScreen[None]):
    """Keys and commands in two tables; Esc, F1 or q closes the screen.

    Args:
        keys: The `[keys]` table of the configuration.
    """

    CSS_PATH = "help.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        bind("help.close", "dismiss"),
    ]

    def __init__(self, registry: SlashRegistry, keys: Mapping[str, str]) -> None:
        super().__init__()
        self._registry, self._changed = registry, keys

    def compose(self) -> ComposeResult:
        """Tables of keys and commands, with notes."""
        with VerticalScroll(id="help") as panel:
            panel.border_title = "Help"
            panel.border_subtitle = f"{hint(self.app, 'help.close').lower()} closes"
            yield Static("Keys", classes="section")
            yield KeyTable(self._rows())
            yield Static("Commands", classes="section")
            yield KeyTable([(command.usage, command.help) for command in self._registry])
            yield Static("To send a message that starts with a command, double the slash: //help.", classes="note")
            yield Static("Faded messages were evicted from the cache: the model no longer sees them.", classes="note")
            yield Static("Change keys in config.toml, under [keys].", classes="note", markup=False)

    def _rows(self) -> list[tuple[str, str]]:
        """Configured keys, plus fixed ones."""
        keys = [key for key in KEYS if key.scope == "chat" and key.id != "prompt.redo"]
        return [*((display_keys(self._changed.get(key.id, key.keys)), key.help) for key in keys), *FIXED]

    def on_mount(self) -> None:
        """Arrow keys scroll."""
        self.query_one("#help").focus()
