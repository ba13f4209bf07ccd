"""The list of models to choose from. It is built on a thread, because reading the local Hub cache can take long."""

from __future__ import annotations

from collections.abc import Callable

from rich.text import Text
from textual import on
from textual.widgets import OptionList
from textual.worker import Worker, WorkerState

from streamchat.base.errors import describe_unexpected
from streamchat.frontend.model_list import FITS, TOO_LARGE, ModelList, columns
from streamchat.models.choices import ModelChoice
from streamchat.tui.bindings import hint
from streamchat.tui.screens.finder import FinderScreen
from streamchat.tui.widgets.text import Verbatim

SIDES = 6
"""Columns of the panel that a row does not use: border, padding, and scroll bar."""


class ModelsScreen(FinderScreen[ModelChoice]):
    """Choose a model; the result is the choice.

    Args:
        find: Returns the list; called on a thread.
        words: Initial search words.
    """

    CSS_PATH = "finder.tcss"
    TITLE = "Models"
    ASK = "words in the name"
    OTHER_ROWS = 8
    NO_MATCH, NO_WORDS = "No models match “{words}”.", "There are no models."

    def __init__(self, find: Callable[[], ModelList], words: str = "") -> None:
        super().__init__(words)
        self._find = find
        self._models: ModelList | None = None
        self._problem = "Looking for models …"

    def on_mount(self) -> None:
        """Look for the models on a thread."""
        super().on_mount()
        self.run_worker(self._find, thread=True, exit_on_error=False, name="models")

    def key_hints(self) -> str:
        """See `FinderScreen`."""
        return f"enter loads it and starts over · {hint(self.app, 'finder.close').lower()} closes"

    @on(Worker.StateChanged)
    def _looked(self, message: Worker.StateChanged) -> None:
        message.stop()
        if message.state is WorkerState.SUCCESS and isinstance(message.worker.result, ModelList):
            self._models = message.worker.result
        elif message.state is WorkerState.ERROR:
            error = message.worker.error
            self._problem = f"The models could not be listed ({describe_unexpected(error or Exception())})."
        else:
            return
        self.search()

    def on_resize(self) -> None:
        """Draw the columns again."""
        super().on_resize()
        if self._models is not None:
            at = self.chosen
            self.search()
            self.query_one(OptionList).highlighted = at

    def find(self, words: str) -> tuple[list[Text], str]:
        """Return the models that match."""
        headings, details = self.query_one("#headings", Verbatim), self.query_one("#details", Verbatim)
        models = self._models
        self._rows = [] if models is None else models.matching(words)
        headings.display = details.display = bool(self._rows)
        if models is None:
            return [], self._problem
        if not self._rows:
            return [], self.NO_MATCH.format(words=words)
        first, *lines = columns(models, self._rows, self.query_one("#finder").size.width - SIDES)
        headings.show(first)
        return [self._drawn(line, models.fit(row)) for line, row in zip(lines, self._rows, strict=True)], ""

    def _drawn(self, line: str, fit: str) -> Text:
        drawn = Text(line, no_wrap=True, overflow="ellipsis")
        if fit in (FITS, TOO_LARGE) and line.endswith(fit):
            drawn.stylize("dim" if fit == FITS else "bold", len(line) - len(fit))
        return drawn

    @on(OptionList.OptionHighlighted)
    def _show_details(self, message: OptionList.OptionHighlighted) -> None:
        message.stop()
        if self._models is not None and message.option_index < len(self._rows):
            self.query_one("#details", Verbatim).show(self._models.details(self._rows[message.option_index]))

    def accept(self) -> None:
        """Dismiss with the selected model."""
        if self.chosen is not None and self._rows:
            self.dismiss(self._rows[self.chosen])
