"""The input line: keys, completion, history and toolbar, on prompt-toolkit's `PromptSession`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, has_focus, is_searching
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import History
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from streamchat.chat.slash import SlashContext, SlashRegistry
from streamchat.repl.terminal import STYLE

PROMPT = "you> "
LEAVE_HINT = "press Ctrl+C again or Ctrl+D to leave"


class SlashCompleter(Completer):
    """Offers commands and their arguments, each with its explanation, once a line begins with a slash."""

    def __init__(self, registry: SlashRegistry, context: SlashContext) -> None:
        self._registry, self._context = registry, context

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """The completions of the text before the cursor."""
        text = document.text_before_cursor
        if "\n" in document.text or document.text_after_cursor:
            return
        for whole, note in self._registry.completions(self._context, text):
            yield Completion(whole, start_position=-len(text), display_meta=note)


class InputLine:
    """Asks for one message at a time.

    Args:
        toolbar: Columns of the terminal -> text of the line under the prompt.
    """

    def __init__(
        self, registry: SlashRegistry, context: SlashContext, history: History, toolbar: Callable[[int], str]
    ) -> None:
        self._toolbar = toolbar
        self._leave_armed = False
        self.session: PromptSession[str] = PromptSession(
            message=FormattedText([("class:you", PROMPT)]),
            multiline=True,
            prompt_continuation=lambda width, line, wrapped: " " * width,
            style=STYLE,
            history=history,
            completer=SlashCompleter(registry, context),
            # only then: room for the menu would be kept under every message
            complete_while_typing=Condition(lambda: self.session.default_buffer.text.startswith("/")),
            auto_suggest=AutoSuggestFromHistory(),
            key_bindings=self._bindings(),
            bottom_toolbar=self._toolbar_text,
            enable_open_in_editor=True,
            enable_suspend=True,
            tempfile_suffix=".md",
        )
        self.session.default_buffer.on_text_changed += self._disarm

    async def ask(self, default: str = "") -> str | None:
        """Read a message; `default` is already on the line. Returns None when the user leaves."""
        self._leave_armed = False
        while True:
            try:
                return await self.session.prompt_async(default=default)
            except EOFError:
                return None
            except KeyboardInterrupt:  # a dumb terminal, where only prompt-toolkit's own keys work
                if self._leave_armed:
                    return None
                self._leave_armed = True
                print(LEAVE_HINT, flush=True)

    def redraw(self) -> None:
        """Show new figures in the toolbar, where a prompt is on the screen."""
        if self.session.app.is_running:
            self.session.app.invalidate()

    def end(self, error: BaseException) -> None:
        """Let a running `ask` raise `error`."""
        if self.session.app.is_running and not self.session.app.is_done:
            self.session.app.exit(exception=error)

    def _toolbar_text(self) -> str:
        if self._leave_armed:
            return f" {LEAVE_HINT}"
        return self._toolbar(get_app().output.get_size().columns)

    def _bindings(self) -> KeyBindings:
        bindings = KeyBindings()
        at_message = has_focus(DEFAULT_BUFFER) & ~is_searching

        @bindings.add("enter", filter=at_message)
        def send(event: KeyPressEvent) -> None:
            if event.current_buffer.text.strip():
                event.current_buffer.validate_and_handle()

        @bindings.add("c-j", filter=at_message)
        @bindings.add("escape", "enter", filter=at_message)
        def newline(event: KeyPressEvent) -> None:
            event.current_buffer.newline(copy_margin=False)

        @bindings.add("c-c", filter=at_message)
        @bindings.add("<sigint>", filter=at_message)
        def clear_or_leave(event: KeyPressEvent) -> None:
            if event.current_buffer.text:
                event.current_buffer.reset()
            elif self._leave_armed:
                event.app.exit(exception=EOFError())
            else:
                self._leave_armed = True

        @bindings.add("c-g", filter=at_message)
        def edit(event: KeyPressEvent) -> None:
            event.current_buffer.open_in_editor()

        return bindings

    def _disarm(self, *_: object) -> None:
        self._leave_armed = False
