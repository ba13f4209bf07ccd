"""The input: multi-line editing, history on the arrow keys, completion, safe paste."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from textual import events
from textual.binding import BindingType
from textual.message import Message
from textual.strip import Strip
from textual.widgets import TextArea

from streamchat.base.sanitize import printable
from streamchat.config.keymap import BY_ID, key_names
from streamchat.tui.bindings import bind
from streamchat.tui.history import PromptHistory
from streamchat.tui.widgets.completion import Completions

Complete = Callable[[str], Sequence[tuple[str, str]]]
"""Text so far -> (whole line, explanation) pairs."""


class Prompt(TextArea):
    """A `TextArea` in which Enter sends.

    Args:
        history: Previous inputs.
        complete: Returns the completions for a line.
        completions: The list that shows the completions.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        bind("prompt.newline", "newline"),
        bind("prompt.delete_or_leave", "delete_or_leave"),
        bind("prompt.page_up", "screen.scroll_page(-1)"),
        bind("prompt.page_down", "screen.scroll_page(1)"),
        bind("prompt.complete", "complete"),
        bind("prompt.edit", "screen.edit"),
        bind("prompt.redo", "redo"),
    ]

    @dataclass
    class Submitted(Message):
        """Enter was pressed on non-blank text."""

        text: str

    class SubmittedBlank(Message):
        """Enter was pressed in a blank input while messages are queued."""

    @dataclass
    class QueueStepped(Message):
        """Up or Down should move through the queued messages: Up in a blank input, both during an edit."""

        by: int
        """-1 = the previous message, 1 = the next one."""
        keystrokes: int
        """`Prompt.keystrokes` then: once more is typed, the step would overwrite it."""

    def __init__(self, history: PromptHistory, complete: Complete, completions: Completions) -> None:
        super().__init__(
            id="prompt",
            soft_wrap=True,
            tab_behavior="focus",
            show_line_numbers=False,
            highlight_cursor_line=False,
            placeholder="Write a message, or / for commands",
        )
        self.prompt_history = history
        self.has_queue = False
        """Whether messages are queued: Up in a blank input edits the newest one."""
        self.edits_queued = False
        """Whether the text is that of a queued message."""
        self.send_keys = key_names(BY_ID["prompt.send"].keys)
        """Keys that send; not a binding, because `TextArea` handles Enter itself."""
        self.keystrokes = 0
        """Number of keys and pastes so far, without Up and Down."""
        self._complete = complete
        self._completions = completions
        self._history_text: str | None = None
        """Text that the history put here; it does not open the completion list."""

    def render_line(self, y: int) -> Strip:
        """Render a row. `TextArea` cannot wrap its placeholder to zero columns."""
        return super().render_line(y) if self.content_size.width > 0 else Strip.blank(self.size.width)

    # --- content --------------------------------------------------------------------------------------------

    @property
    def is_blank(self) -> bool:
        """Whether the text is only whitespace. Cheap for long text."""
        return all(not self.document.get_line(index).strip() for index in range(self.document.line_count))

    def put(self, text: str) -> None:
        """Replace the content and move the cursor to the end. Removes control characters."""
        self.load_text(printable(text))
        self.move_cursor(self.document.end)

    def empty(self) -> None:
        """Clear the input; Ctrl+Z restores it."""
        self.history.checkpoint()
        self.clear()

    def restore_text(self, text: str) -> None:
        """Insert a message that was not sent before the current content."""
        self.put(text if self.is_blank else f"{text}\n{self.text}")

    # --- keys -----------------------------------------------------------------------------------------------

    async def _on_key(self, event: events.Key) -> None:
        self.keystrokes += event.key not in ("up", "down")
        if self._completions.shown:
            self._offer()  # a burst of keys may have changed the text
        if self._completions.shown and event.key in ("up", "down", "escape", "enter"):
            event.stop()
            event.prevent_default()
            match event.key:
                case "up":
                    self._completions.move(-1)
                case "down":
                    self._completions.move(1)
                case "escape":
                    self._completions.hide()
                case _:
                    self._accept()
        elif event.key in self.send_keys:
            event.stop()
            event.prevent_default()
            self._send()
        elif not event.is_printable and event.key != "enter" and await self.app._check_bindings(event.key):
            # The app would look for bindings only after the key has bubbled up to it, and so after any characters that
            # follow in the same burst: "ab", Backspace, "c" would become "ab".
            event.stop()
            event.prevent_default()

    def _send(self) -> None:
        """Submit the content and clear the input at once, so that later keys go to the next message."""
        if not self.is_blank:
            text = self.text
            self.load_text("")
            self.post_message(self.Submitted(text))
        elif self.has_queue:
            self.post_message(self.SubmittedBlank())

    def _accept(self) -> None:
        """Enter in the list: send the text if it is complete, else insert the highlighted completion."""
        chosen, moved, typed = self._completions.chosen, self._completions.moved, self._line()
        offered = {line for line, _ in self._complete(typed.strip())}
        self._completions.hide()
        if not moved and (typed.strip() in offered or (typed.startswith("/") and typed.endswith(" "))):
            self._send()
            return
        if not typed.startswith("/"):
            self._fill(chosen)
            return
        arguments = bool(self._complete(f"{chosen} "))
        command = " " not in chosen
        self._fill(f"{chosen} " if arguments else chosen)
        if command and not arguments:
            self._send()

    def _line(self) -> str:
        """The current line, up to the cursor."""
        row, column = self.cursor_location
        return self.document.get_line(row)[:column]

    def _fill(self, line: str) -> None:
        """Replace the current line, up to the cursor, by `line`."""
        row, column = self.cursor_location
        if not line.startswith("/") and not line.endswith("/"):
            line += " "
        result = self.replace(line, (row, 0), (row, column), maintain_selection_offset=False)
        self.move_cursor(result.end_location)

    def action_complete(self) -> None:
        """Tab: insert the highlighted completion."""
        chosen = self._completions.chosen
        if chosen:
            self._fill(f"{chosen} " if chosen.startswith("/") and not chosen.endswith("/") else chosen)

    def action_newline(self) -> None:
        """Insert a line break."""
        self.insert("\n")
        self.scroll_cursor_visible()

    async def action_delete_or_leave(self) -> None:
        """Ctrl+D, as in a shell: quit if the input is empty, else delete right."""
        if self.document.line_count == 1 and not self.document.get_line(0):
            await self.app.action_quit()
        else:
            self.action_delete_right()

    def action_cursor_up(self, select: bool = False) -> None:
        """Up: on the first row, the previous queued message or history entry."""
        if select or self._row() > 0:
            super().action_cursor_up(select)
        elif self.edits_queued or (self.has_queue and self.is_blank):
            self.post_message(self.QueueStepped(-1, self.keystrokes))
        else:
            self.show_older()

    def action_cursor_down(self, select: bool = False) -> None:
        """Down: on the last row, the next queued message or history entry."""
        if select or self._row() < self.wrapped_document.height - 1:
            super().action_cursor_down(select)
        elif self.edits_queued:
            self.post_message(self.QueueStepped(1, self.keystrokes))
        else:
            self._show_entry(self.prompt_history.newer())

    def action_cursor_line_end(self, select: bool = False) -> None:
        """End: at the end of the text, jump to the end of the conversation."""
        if not select and self.cursor_location == self.document.end:
            self.call_later(self.run_action, "screen.follow")
        super().action_cursor_line_end(select)

    def show_older(self) -> None:
        """Replace the content by the previous history entry."""
        self._show_entry(self.prompt_history.older(self.text))

    def _row(self) -> int:
        return self.wrapped_document.location_to_offset(self.cursor_location).y

    def _show_entry(self, text: str | None) -> None:
        if text is not None:
            self._history_text = text
            self.put(text)

    # --- changes --------------------------------------------------------------------------------------------

    async def _on_paste(self, event: events.Paste) -> None:
        """Insert a paste without sending it, with `\\n` line ends and without control characters."""
        event.stop()
        event.prevent_default()
        self.keystrokes += 1
        text = printable(event.text.replace("\r\n", "\n").replace("\r", "\n")).expandtabs(4)
        result = self.replace(text, *self.selection, maintain_selection_offset=False)
        self.move_cursor(result.end_location)
        self.focus()

    def on_text_area_changed(self, event: TextArea.Changed) -> None:
        """Update the completions."""
        self._offer()

    def _offer(self) -> None:
        """Offer commands if the only line starts with a slash, and paths after an @."""
        line = self._line()
        recalled, self._history_text = self._history_text, None
        command = line.startswith("/")
        if line == recalled or (command and self.text != line) or not (command or "@" in line):
            self._completions.hide()
            return
        offered = self._complete(line)
        if [whole for whole, _ in offered] == [line.rstrip()]:
            offered = []
        if [whole for whole, _ in offered] != self._completions.lines:
            self._completions.offer(offered)
