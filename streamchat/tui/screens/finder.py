"""A list that narrows while one types, over the chat: saved conversations, and what was said in them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList
from textual.widgets.option_list import Option

from streamchat.base.errors import StoreError
from streamchat.base.formatting import human_when, plural
from streamchat.base.sanitize import one_line
from streamchat.frontend.messages import excerpt
from streamchat.store.records import SearchHit
from streamchat.store.store import Store
from streamchat.tui.bindings import bind, hint
from streamchat.tui.widgets.text import Verbatim

LIMIT = 100
PAUSE_S = 0.15
"""After so long without a key the store is asked."""


@dataclass(frozen=True)
class Row:
    """One thing that was found: a heading, more about it, and a longer text under them."""

    heading: str
    about: str
    text: str = ""

    def drawn(self) -> Text:
        """For the list."""
        drawn = Text(one_line(self.heading), style="bold", overflow="ellipsis", no_wrap=True)
        drawn.append(f"  {one_line(self.about)}", style="not bold dim")
        if self.text:
            drawn.append(f"\n{one_line(self.text)}", style="not bold")
        return drawn


Chosen = TypeVar("Chosen")


class FinderScreen(ModalScreen[Chosen | None], Generic[Chosen]):
    """Type to search, Up and Down to choose, Enter to take, Esc to go back.

    Subclasses say what is looked for and what taking means.

    Args:
        words: To begin with.
        here: The conversation that is open.
        open_store: Opens the store for one search.
    """

    CSS_PATH = "finder.tcss"
    TITLE = ""
    ASK = ""
    BINDINGS: ClassVar[list[BindingType]] = [
        bind("finder.close", "dismiss", priority=True),
        bind("finder.up", "move(-1)", priority=True),
        bind("finder.down", "move(1)", priority=True),
        bind("finder.page_up", "move(-8)", priority=True),
        bind("finder.page_down", "move(8)", priority=True),
    ]

    def __init__(self, words: str = "", here: str | None = None, open_store: Callable[[], Store] = Store) -> None:
        super().__init__()
        self._words, self._here, self._open_store = words, here, open_store
        self._rows: list[Any] = []
        """What the rows of the list stand for."""

    def look(self, store: Store, words: str) -> list[Row]:
        """What `words` find, best first; sets `_rows`."""
        raise NotImplementedError

    def keys(self) -> str:
        """What keys do, for the lower edge."""
        raise NotImplementedError

    def nothing(self, words: str) -> str:
        """What to say where nothing is found."""
        raise NotImplementedError

    def compose(self) -> ComposeResult:
        """The words over the list."""
        with Vertical(id="finder") as panel:
            panel.border_title = self.TITLE
            panel.border_subtitle = self.keys()
            yield Input(self._words, placeholder=self.ASK, id="words", select_on_focus=False)
            yield OptionList(id="rows")
            yield Verbatim("", id="nothing")

    def on_mount(self) -> None:
        """Ask at once, with whatever words there are."""
        self.query_one(Input).focus()
        self.query_one(OptionList).can_focus = False
        self.search()

    @on(Input.Changed)
    def _changed(self, message: Input.Changed) -> None:
        message.stop()
        self.set_timer(PAUSE_S, lambda: self.search() if self.is_attached and message.value == self.words else None)

    @property
    def words(self) -> str:
        """What is in the input."""
        return self.query_one(Input).value

    def search(self) -> None:
        """Fill the list."""
        rows, problem = list[Row](), ""
        try:
            with self._open_store() as store:
                rows = self.look(store, self.words)
        except StoreError as error:
            problem = str(error)
        listed = self.query_one(OptionList)
        listed.clear_options()
        listed.add_options([Option(row.drawn()) for row in rows])
        listed.highlighted = 0 if rows else None
        listed.display = bool(rows)
        note = self.query_one("#nothing", Verbatim)
        note.show(one_line(problem) or ("" if rows else self.nothing(self.words)))
        note.display = not rows

    @property
    def chosen(self) -> int | None:
        """Number of the row that is chosen."""
        return self.query_one(OptionList).highlighted

    def action_move(self, by: int) -> None:
        """Choose another row."""
        listed = self.query_one(OptionList)
        if listed.option_count:
            at = (listed.highlighted or 0) + by
            listed.highlighted = at % listed.option_count if abs(by) == 1 else max(0, min(at, listed.option_count - 1))

    @on(OptionList.OptionSelected)
    def _clicked(self, message: OptionList.OptionSelected) -> None:
        message.stop()
        self.take()

    @on(Input.Submitted)
    def _entered(self, message: Input.Submitted) -> None:
        message.stop()
        self.take()

    def take(self) -> None:
        """The chosen row is the one."""
        raise NotImplementedError


class SessionsScreen(FinderScreen[str]):
    """Saved conversations; the result is an id."""

    TITLE = "Conversations"
    ASK = "words of the title or of what was said"

    def look(self, store: Store, words: str) -> list[Row]:
        """Newest first."""
        self._rows = store.sessions(words, limit=LIMIT)
        now = time.time()
        rows = []
        for info in self._rows:
            turns = plural(info.turns, "turn")
            here = " · open" if info.id == self._here else ""
            rows.append(
                Row(info.title, f"{human_when(info.updated, now)} · {turns} · {info.model_name} · {info.id}{here}")
            )
        return rows

    def keys(self) -> str:
        """Of this list."""
        return f"enter goes on with it · {hint(self.app, 'finder.close').lower()} closes"

    def nothing(self, words: str) -> str:
        """Of this list."""
        return f"No conversation has “{words}”." if words.strip() else "No conversation is saved yet."

    def take(self) -> None:
        """Go on with it."""
        if self.chosen is not None:
            self.dismiss(self._rows[self.chosen].id)


@dataclass(frozen=True)
class Recalled:
    """What to do with a message."""

    found: SearchHit
    how: Literal["quote", "keep"]


class RecallScreen(FinderScreen[Recalled]):
    """Everything ever said.

    Args:
        words: To begin with.
        here: The conversation that is open.
        thinking: How reasoning is shown.
    """

    TITLE = "Recall"
    ASK = "words of what was said, in any conversation"
    BINDINGS: ClassVar[list[BindingType]] = [bind("finder.keep", "keep", priority=True)]

    def __init__(self, words: str, here: str | None, thinking: str) -> None:
        super().__init__(words, here)
        self._thinking = thinking

    def look(self, store: Store, words: str) -> list[Row]:
        """Best first."""
        self._rows = store.search(words, limit=LIMIT)
        now = time.time()
        rows = []
        for found in self._rows:
            who = "You" if found.role == "user" else "The model"
            place = "here" if found.session == self._here else found.title
            undone = " · taken back" if found.undone else ""
            about = f"{human_when(found.at, now)} · {place} · turn {found.turn}{undone}"
            rows.append(Row(who, about, excerpt(found, self._thinking)))
        return rows

    def keys(self) -> str:
        """Of this list."""
        close, keep = (hint(self.app, key).lower() for key in ("finder.close", "finder.keep"))
        return f"enter puts it before the model again · {keep} pins it too · {close} closes"

    def nothing(self, words: str) -> str:
        """Of this list."""
        return f"Nothing was said with “{words}”." if words.strip() else "Type words to find what was said."

    def take(self) -> None:
        """Put it before the model again."""
        self._end("quote")

    def action_keep(self) -> None:
        """The same, pinned."""
        self._end("keep")

    def _end(self, how: Literal["quote", "keep"]) -> None:
        if self.chosen is not None:
            self.dismiss(Recalled(self._rows[self.chosen], how))
