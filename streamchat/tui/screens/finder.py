"""Search dialogs over the chat that filter while the user types: sessions and their messages."""

from __future__ import annotations

import time
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
from streamchat.frontend.messages import excerpt, fork_mark
from streamchat.frontend.saved import open_store
from streamchat.store.records import SearchHit
from streamchat.store.store import Store
from streamchat.store.tree import as_tree
from streamchat.tui.bindings import bind, hint
from streamchat.tui.screens.closable import Closable
from streamchat.tui.widgets.line_input import LineInput
from streamchat.tui.widgets.option_list import Options
from streamchat.tui.widgets.text import Verbatim

LIMIT = 100
MAX_ROWS = 24
"""Maximum height of the list."""
PAUSE_S = 0.15
"""Seconds without a key press before the store is queried."""


@dataclass(frozen=True)
class Row:
    """One search result: a heading, details next to it, and an optional text below."""

    heading: str
    about: str
    text: str = ""

    def render(self) -> Text:
        """The row as the list shows it."""
        drawn = Text(one_line(self.heading), style="bold", overflow="ellipsis", no_wrap=True)
        drawn.append(f"  {one_line(self.about)}", style="not bold dim")
        if self.text:
            drawn.append(f"\n{one_line(self.text)}", style="not bold")
        return drawn


Chosen = TypeVar("Chosen")


class FinderScreen(Closable, ModalScreen[Chosen | None], Generic[Chosen]):
    """Type to search, Up and Down to select, Enter to accept, Esc to close.

    Subclasses define the search and the result.

    Args:
        words: Initial search words.
        here: Id of the open session.
    """

    CSS_PATH = "finder.tcss"
    TITLE: ClassVar[str]
    ASK: ClassVar[str]
    NO_MATCH: ClassVar[str]
    """Message if nothing is found; `{words}` are the words."""
    NO_WORDS: ClassVar[str]
    """Message if nothing is found without words."""
    OTHER_ROWS: ClassVar[int] = 5
    """Rows of the panel besides the list: border, words, and space."""
    BINDINGS: ClassVar[list[BindingType]] = [
        bind("finder.close", "dismiss", priority=True),
        bind("finder.up", "move(-1)", priority=True),
        bind("finder.down", "move(1)", priority=True),
        bind("finder.page_up", "move(-8)", priority=True),
        bind("finder.page_down", "move(8)", priority=True),
    ]

    def __init__(self, words: str = "", here: str | None = None) -> None:
        super().__init__()
        self._words, self._here = words, here
        self._searched = words
        """The words of the list that is shown."""
        self._rows: list[Any] = []
        """The objects behind the rows of the list."""

    def find_rows(self, store: Store, words: str) -> list[Row]:
        """Search the store for `words`, best match first; sets `_rows`."""
        raise NotImplementedError

    def find(self, words: str) -> tuple[list[Text], str]:
        """Search for `words`; sets `_rows`. Returns the drawn rows, and what the user must know if there are none."""
        try:
            with open_store() as store:
                rows = [row.render() for row in self.find_rows(store, words)]
        except StoreError as error:
            return [], str(error)
        return rows, "" if rows else (self.NO_MATCH if words.strip() else self.NO_WORDS).format(words=words)

    def key_hints(self) -> str:
        """Key hints for the lower border."""
        raise NotImplementedError

    def compose(self) -> ComposeResult:
        """Search words above the list."""
        with Vertical(id="finder") as panel:
            panel.border_title = self.TITLE
            panel.border_subtitle = self.key_hints()
            yield LineInput(self._words, placeholder=self.ASK, id="words", select_on_focus=False)
            yield Verbatim("", id="headings")
            yield Options(id="rows")
            yield Verbatim("", id="nothing")
            yield Verbatim("", id="details")

    def on_resize(self) -> None:
        """Limit the height of the list, so that all of the panel is on the screen."""
        self.query_one(OptionList).styles.max_height = max(
            3, min(MAX_ROWS, self.size.height * 4 // 5 - self.OTHER_ROWS)
        )

    def on_mount(self) -> None:
        """Search at once with the initial words."""
        self.query_one(Input).focus()
        self.query_one(OptionList).can_focus = False
        self.search()

    @on(Input.Changed)
    def _changed(self, message: Input.Changed) -> None:
        message.stop()
        self.set_timer(PAUSE_S, lambda: self.search() if self.is_attached and message.value == self.words else None)

    @property
    def words(self) -> str:
        """The search words in the input."""
        return self.query_one(Input).value

    def search(self) -> None:
        """Update the list."""
        self._searched = self.words
        rows, problem = self.find(self._searched)
        listed = self.query_one(OptionList)
        listed.clear_options()
        listed.add_options([Option(row) for row in rows])
        listed.highlighted = 0 if rows else None
        listed.display = bool(rows)
        note = self.query_one("#nothing", Verbatim)
        note.show(one_line(problem))
        note.display = not rows

    @property
    def chosen(self) -> int | None:
        """Index of the selected row; None if the list is empty."""
        return self.query_one(OptionList).highlighted

    def action_move(self, by: int) -> None:
        """Move the selection by `by` rows."""
        listed = self.query_one(OptionList)
        if listed.option_count:
            at = (listed.highlighted or 0) + by
            listed.highlighted = at % listed.option_count if abs(by) == 1 else max(0, min(at, listed.option_count - 1))

    @on(OptionList.OptionSelected)
    @on(Input.Submitted)
    def _accepted(self, message: OptionList.OptionSelected | Input.Submitted) -> None:
        message.stop()
        if self.words != self._searched:  # Enter came within the pause after the last letter
            self.search()
        self.accept()

    def accept(self) -> None:
        """Dismiss the screen with the selected row."""
        raise NotImplementedError


class SessionsScreen(FinderScreen[str]):
    """Search sessions; the result is a session id."""

    TITLE = "Sessions"
    ASK = "words in the title or the messages"
    NO_MATCH, NO_WORDS = "No sessions match “{words}”.", "No saved sessions yet."

    def find_rows(self, store: Store, words: str) -> list[Row]:
        """Find sessions, newest first, and each fork below its parent."""
        tree = as_tree(store.sessions(words, limit=LIMIT))
        self._rows = [info for info, _ in tree]
        now = time.time()
        rows = []
        for info, depth in tree:
            turns = plural(info.turns, "turn")
            here = " · open" if info.id == self._here else ""
            rows.append(
                Row(
                    fork_mark(info, depth) + info.title,
                    f"{human_when(info.updated, now)} · {turns} · {info.model_name} · {info.id}{here}",
                )
            )
        return rows

    def key_hints(self) -> str:
        """See `FinderScreen`."""
        return f"enter resumes · {hint(self.app, 'finder.close').lower()} closes"

    def accept(self) -> None:
        """Dismiss with the id of the selected session."""
        if self.chosen is not None:
            self.dismiss(self._rows[self.chosen].id)


@dataclass(frozen=True)
class RecallChoice:
    """The selected message and what to do with it."""

    found: SearchHit
    action: Literal["quote", "keep"]


class RecallScreen(FinderScreen[RecallChoice]):
    """Search the messages of all sessions.

    Args:
        words: Initial search words.
        here: Id of the open session.
        thinking: How reasoning is displayed.
    """

    TITLE = "Recall"
    ASK = "words in any message of any session"
    NO_MATCH, NO_WORDS = "No messages match “{words}”.", "Type words to search all messages."
    BINDINGS: ClassVar[list[BindingType]] = [bind("finder.keep", "keep", priority=True)]

    def __init__(self, words: str, here: str | None, thinking: str) -> None:
        super().__init__(words, here)
        self._thinking = thinking

    def find_rows(self, store: Store, words: str) -> list[Row]:
        """Find messages, best match first."""
        self._rows = store.search(words, limit=LIMIT, here=self._here)
        now = time.time()
        rows = []
        for found in self._rows:
            who = "You" if found.role == "user" else "The model"
            where = "this session" if found.session == self._here else found.title
            undone = " · undone" if found.undone else ""
            about = f"{human_when(found.at, now)} · {where} · turn {found.turn}{undone}"
            rows.append(Row(who, about, excerpt(found, self._thinking)))
        return rows

    def key_hints(self) -> str:
        """See `FinderScreen`."""
        close, keep = (hint(self.app, key).lower() for key in ("finder.close", "finder.keep"))
        return f"enter quotes it to the model · {keep} also pins it · {close} closes"

    def accept(self) -> None:
        """Dismiss to quote the selected message."""
        self._end("quote")

    def action_keep(self) -> None:
        """Dismiss to quote and pin the selected message."""
        self._end("keep")

    def _end(self, action: Literal["quote", "keep"]) -> None:
        if self.chosen is not None:
            self.dismiss(RecallChoice(self._rows[self.chosen], action))
