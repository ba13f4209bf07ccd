"""The input with its completions, its key hints, and the size of a long message."""

from __future__ import annotations

from textual import on
from textual.app import ComposeResult, SuspendNotSupported
from textual.containers import Vertical
from textual.timer import Timer

from streamchat.base.errors import ConfigError
from streamchat.base.events import TextCounted
from streamchat.base.requests import CountTokens
from streamchat.config.keymap import keys_of
from streamchat.frontend import editor, mentions
from streamchat.tui.bindings import hint
from streamchat.tui.measure import MessageSize
from streamchat.tui.state import ChatState
from streamchat.tui.widgets.completion import Completions
from streamchat.tui.widgets.prompt import Prompt

PAUSE_S = 0.4
"""Seconds without a key press before the text is measured."""


class Composer(Vertical):
    """Where the user writes. `Prompt` posts what is to be sent."""

    def __init__(self, state: ChatState) -> None:
        super().__init__()
        self._state = state
        self._completions = Completions()
        self.prompt = Prompt(state.history, self._complete, self._completions)
        self._message_size = MessageSize(lambda text: state.engine.send(CountTokens(text)))
        self._pause_timer: Timer | None = None
        self._end_hint = self._hint = ""

    def compose(self) -> ComposeResult:
        """The completions above the input."""
        yield self._completions
        yield self.prompt

    def on_mount(self) -> None:
        """Apply the configured keys; make the input usable at once, unless the app only watches."""
        prompt = self.prompt
        prompt.send_keys = keys_of("prompt.send", self._state.configuration.keys)
        self.show_hint()
        self._end_hint = f"▾ scrolled back · {hint(self.app, 'chat.follow')} jumps to the end"
        prompt.display = not self._state.watching
        prompt.disabled = self._state.watching
        if prompt.display:
            prompt.focus()

    def show_following(self, following: bool) -> None:
        """Show how to jump to the end while the conversation is scrolled back."""
        self.prompt.border_title = "" if following else self._end_hint

    def _complete(self, text: str) -> list[tuple[str, str]]:
        if text.startswith("/"):
            return self._state.registry.completions(self._state.context, text)
        path = mentions.partial_mention(text)
        if path is None:
            return []
        before = text[: len(text) - len(path)]
        return [(before + whole, note) for whole, note in mentions.complete_path(path)]

    # --- size of the message --------------------------------------------------------------------------------

    def counted(self, event: TextCounted) -> None:
        """Show the size that the engine has counted."""
        self._message_size.counted(event.text, event.tokens)
        self.show_hint()

    @on(Prompt.Changed)
    def _edited(self, message: Prompt.Changed) -> None:
        """Measure the text when the user pauses."""
        message.stop()
        if self._pause_timer is not None:
            self._pause_timer.stop()
        self._pause_timer = self.set_timer(PAUSE_S, self._measure)
        self.show_hint()

    def _measure(self) -> None:
        self._message_size.measure(self.prompt.text)
        self.show_hint()

    def show_hint(self) -> None:
        """Show the size of a long text, an estimate until the engine has counted its tokens; else the keys."""
        size = self._message_size.summary(self.prompt.text, self._state.board.cache)
        verb = "saves" if self.prompt.edits_queued else "sends"
        keys = f"{hint(self.app, 'prompt.send')} {verb} · {hint(self.app, 'prompt.newline')} new line"
        if (size or keys) != self._hint:  # each assignment draws the input again
            self._hint = self.prompt.border_subtitle = size or keys

    # --- editor ---------------------------------------------------------------------------------------------

    def open_editor(self) -> None:
        """Write the message in the user's editor.

        Raises:
            ConfigError: No editor is set, it failed, or the app cannot be suspended; the text is unchanged.
        """
        try:
            self.prompt.put(editor.edit(self.prompt.text, self.app.suspend()))
        except SuspendNotSupported:
            raise ConfigError("cannot open an editor: this system cannot suspend the app") from None
