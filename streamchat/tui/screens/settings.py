"""The settings screen: every setting with value, origin, and meaning; edit, reset, write to the configuration file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError
from streamchat.base.sanitize import one_line, printable
from streamchat.config.settings import default_of, setting_fields
from streamchat.frontend.settings_table import SettingRow, SettingsTable, shown_value
from streamchat.tui.bindings import bind, hint
from streamchat.tui.screens.closable import Closable
from streamchat.tui.widgets.line_input import LineInput
from streamchat.tui.widgets.option_list import Options
from streamchat.tui.widgets.text import Verbatim

NAME_WIDTH, VALUE_WIDTH = max(map(len, setting_fields())) + 1, 24
PAGE = 8


class SettingsScreen(Closable, ModalScreen[None]):
    """Type to filter, Up and Down to select, Enter to edit; Esc goes back.

    Args:
        table: The settings; keeps values for the next start while the screen is closed.
        can_change: Whether the engine can change settings; if it has failed, they are for the next start.
        words: Initial filter.
    """

    CSS_PATH = "settings.tcss"
    VERTICAL_BREAKPOINTS = [(0, "-low"), (20, "-high")]  # noqa: RUF012 - Textual declares it for instances
    BINDINGS: ClassVar[list[BindingType]] = [
        bind("settings.close", "leave", priority=True),
        bind("settings.up", "move(-1)", priority=True),
        bind("settings.down", "move(1)", priority=True),
        bind("settings.page_up", f"move(-{PAGE})", priority=True),
        bind("settings.page_down", f"move({PAGE})", priority=True),
        bind("settings.reset", "reset", priority=True),
        bind("settings.write", "write", priority=True),
    ]

    def __init__(self, table: SettingsTable, can_change: Callable[[], bool], words: str = "") -> None:
        super().__init__()
        self._table, self._can_change, self._words = table, can_change, words
        self._rows: list[SettingRow | None] = []
        """The rows of the list; None for the heading of a section."""
        self._edited = ""
        """The setting that is being edited; '' for none."""

    # --- what is shown --------------------------------------------------------------------------------------------

    def compose(self) -> ComposeResult:
        """The filter, the list, and below it the selected setting with a line to edit it."""
        with Vertical(id="settings") as panel:
            panel.border_title = "Settings"
            yield LineInput(self._words, placeholder="words in the name, the meaning or the value", id="words")
            yield Options(id="rows")
            with Vertical(id="about"):
                yield Static(id="meaning", markup=False)
                with Horizontal(id="edit"):
                    yield Static(id="label", markup=False)
                    yield LineInput(id="value", select_on_focus=False)
                yield Verbatim("", id="message")

    def on_mount(self) -> None:
        """Show all settings that the initial words filter."""
        self.query_one(OptionList).can_focus = False
        self.query_one("#edit").display = False
        self._field("words").focus()
        self.refresh_rows()

    def on_resize(self) -> None:
        """Keep the selected setting in view."""
        self.call_after_refresh(self.query_one(OptionList).scroll_to_highlight)

    def refresh_rows(self, select: str = "") -> None:
        """Update the list, and select the setting `select`, or else the one that was selected, if it is there."""
        listed, selected = self.query_one(OptionList), self.selected
        rows = self._table.rows(self._field("words").value)
        self._rows = []
        listed.clear_options()
        for row in rows:
            if not any(each and each.section == row.section for each in self._rows):
                self._rows.append(None)
                listed.add_option(Option(Text(row.section, style="bold"), disabled=True))
            self._rows.append(row)
            listed.add_option(Option(_line(row)))
        listed.display = bool(rows)
        names = [row and row.name for row in self._rows]
        wanted = select or (selected.name if selected is not None else "")
        listed.highlighted = names.index(wanted if wanted in names else rows[0].name) if rows else None
        self._show_selected()

    @property
    def selected(self) -> SettingRow | None:
        """The selected setting; None if the list is empty."""
        at = self.query_one(OptionList).highlighted
        return None if at is None or at >= len(self._rows) else self._rows[at]

    def _show_selected(self) -> None:
        row = self.selected
        about = self.query_one("#meaning", Static)
        about.display = row is not None
        if row is None:
            self._say(f"No setting has “{self._field('words').value}”.")
        else:
            facts = (
                f"{_sentence(row.legal)} Default: {shown_value(default_of(row.name)) or 'empty'}. "
                f"Now from: {row.origin}. {_sentence(row.effect)}"
            )
            about.update(Content.assemble(f"{row.help}.\n", (facts, "dim")))
        self.query_one("#settings").border_subtitle = self._hints(row)

    def _hints(self, row: SettingRow | None) -> str:
        close, reset, write = (hint(self.app, f"settings.{each}").lower() for each in ("close", "reset", "write"))
        if self._edited:
            choose = "up/down choose · " if row is not None and row.choices else ""
            return f"{choose}enter accepts · {close} cancels"
        return f"enter edits · {reset} resets · {write} writes config.toml · {close} closes"

    def _say(self, text: str, *, error: bool = False) -> None:
        message = self.query_one("#message", Verbatim)
        message.set_class(error, "-error")
        message.show(one_line(text))

    def _field(self, name: str) -> Input:
        return self.query_one(f"#{name}", Input)

    def show_event(self, event: ev.Event) -> None:
        """Show that a setting has changed, or why not."""
        if isinstance(event, ev.SettingChanged) and not self._edited:
            if self.query_one("#message").has_class("-error"):
                self._say("")
            self.refresh_rows()
        elif isinstance(event, ev.Notice) and not self._edited:
            self._say(event.text, error=event.level != "info")
            self.refresh_rows()

    # --- filter and selection -------------------------------------------------------------------------------------

    @on(Input.Changed, "#words")
    def _filter(self, message: Input.Changed) -> None:
        message.stop()
        self._say("")
        self.refresh_rows(self._table.best_match(message.value))

    def action_move(self, by: int) -> None:
        """Select another setting; in the line of a setting with choices, take another choice."""
        if self._edited:
            self._choose(by)
            return
        places = [at for at, row in enumerate(self._rows) if row is not None]
        listed = self.query_one(OptionList)
        if not places or listed.highlighted is None:
            return
        at = places.index(listed.highlighted) + by
        listed.highlighted = places[at % len(places) if abs(by) == 1 else max(0, min(at, len(places) - 1))]

    @on(OptionList.OptionHighlighted)
    def _highlighted(self, message: OptionList.OptionHighlighted) -> None:
        message.stop()
        if not self._edited:
            self._show_selected()

    # --- editing --------------------------------------------------------------------------------------------------

    @on(OptionList.OptionSelected)
    @on(Input.Submitted, "#words")
    def _begin(self, message: OptionList.OptionSelected | Input.Submitted) -> None:
        message.stop()
        row = self.selected
        if row is None or self._edited:
            return
        if "\n" in row.value:
            self._say(f"{row.name} has several lines; change it in config.toml", error=True)
            return
        if printable(row.value) != row.value:
            self._say(f"{row.name} has control characters; change it in config.toml", error=True)
            return
        self._edited = row.name
        field = self._field("value")
        field.value = row.value if row.wanted is None else row.wanted
        field.cursor_position = len(field.value)
        self.query_one("#label", Static).update(f"{row.name} = ")
        self.query_one("#edit").display = True
        self._say("")
        field.focus()
        self.query_one("#settings").border_subtitle = self._hints(row)

    def _choose(self, by: int) -> None:
        row = self._table.row(self._edited)
        if row.choices and abs(by) == 1:
            field = self._field("value")
            at = row.choices.index(field.value) + by if field.value in row.choices else 0
            field.value = row.choices[at % len(row.choices)]
            field.cursor_position = len(field.value)

    @on(Input.Changed, "#value")
    def _validate(self, message: Input.Changed) -> None:
        message.stop()
        if self._edited:
            self._checked()

    def _checked(self) -> Any:
        """Return the value in the line; None if it is not valid, which the message says."""
        field = self._field("value")
        try:
            value = self._table.check(self._edited, field.value)
        except ConfigError as error:
            self._say(str(error), error=True)
            field.add_class("-error")
            return None
        self._say("")
        field.remove_class("-error")
        return value

    @on(Input.Submitted, "#value")
    def _accept(self, message: Input.Submitted) -> None:
        message.stop()
        name, value = self._edited, self._checked()
        if value is None:
            return
        if self._table.row(name).live and self._can_change():
            self._table.ask(name, value)
        else:
            self._table.want(name, value)
        self._end_edit()
        self._say_next(name)

    def _say_next(self, name: str) -> None:
        row = self._table.row(name)
        if row.wanted is not None and self._table.waits_for_start(name):
            write = hint(self.app, "settings.write").lower()
            self._say(f"{name} = {row.wanted} is for the next start: {write} writes it to config.toml")

    def _end_edit(self) -> None:
        self._edited = ""
        self.query_one("#edit").display = False
        self._field("words").focus()
        self.refresh_rows()

    def action_leave(self) -> None:
        """Cancel the edit, or close the screen."""
        if self._edited:
            self._say("")
            self._end_edit()
        else:
            self.dismiss()

    def action_reset(self) -> None:
        """Set the selected setting to its default, or to what the model's makers advise."""
        row = self.selected
        if row is None or self._edited:
            return
        self._table.reset(row.name, now=row.live and self._can_change())
        self.refresh_rows()
        self._say_next(row.name)

    def action_write(self) -> None:
        """Write the selected setting to the configuration file."""
        row = self.selected
        if row is None or self._edited:
            return
        try:
            text = self._table.write(row.name)
        except ConfigError as error:
            self._say(str(error), error=True)
        else:
            self.refresh_rows()
            self._say(text)


def _line(row: SettingRow) -> Text:
    """The row as the list shows it."""
    drawn = Text("  ", overflow="ellipsis", no_wrap=True)
    drawn.append(row.name.ljust(NAME_WIDTH))
    value = one_line(row.value if row.wanted is None else f"{row.value} → {row.wanted}") or "empty"
    shown = value if len(value) < VALUE_WIDTH else f"{value[: VALUE_WIDTH - 2]}…"
    drawn.append(shown.ljust(VALUE_WIDTH), style="bold" if row.wanted is not None else "")
    drawn.append(one_line(row.note or row.origin), style="dim")
    return drawn


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
