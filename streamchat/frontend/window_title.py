"""The title of the terminal window: the program, the model, and what it does."""

from __future__ import annotations

from collections.abc import Mapping

from streamchat.base import events as ev
from streamchat.frontend.terminal_codes import RESTORE_TITLE, SAVE_TITLE, supports_osc, title_code

NAME = "streamchat"


class WindowTitle:
    """Returns the sequences to write: `begin`, `after` each event, and `end`; all are '' if titles are off.

    Args:
        environ: Environment of the process, which describes the terminal.
        is_on: The setting `window_title`.
    """

    def __init__(self, environ: Mapping[str, str], *, is_on: bool) -> None:
        self._is_on = is_on and supports_osc(environ)
        self._model, self._state = "", "loading"

    @property
    def text(self) -> str:
        """The title: `streamchat: SmolLM2-135M-Instruct (ready)`."""
        return f"{NAME}: {self._model} ({self._state})" if self._model else f"{NAME} ({self._state})"

    def begin(self) -> str:
        """Remember the title of the terminal, and set this one."""
        return f"{SAVE_TITLE}{title_code(self.text)}" if self._is_on else ""

    def after(self, event: ev.Event) -> str:
        """Return the sequence that follows from an event; '' if the title stays."""
        before = self.text
        match event:
            case ev.ModelLoading():
                self._state = "loading"
            case ev.ModelReady(info=info) | ev.ConversationResumed(info=info):
                self._model, self._state = info.name, "ready"
            case ev.TurnStarted():
                self._state = "replying"
            case ev.TurnFinished():
                self._state = "ready"
            case ev.Notice(level="error") if self._model and self._state == "loading":
                self._state = "ready"  # the previous model is kept
            case ev.EngineFailed():
                self._state = "failed"
            case _:
                pass
        return title_code(self.text) if self._is_on and self.text != before else ""

    def end(self) -> str:
        """Restore the title of the terminal."""
        return RESTORE_TITLE if self._is_on else ""
