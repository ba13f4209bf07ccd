"""The input line: keys, completion, history and toolbar, based on prompt-toolkit's `PromptSession`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext

from prompt_toolkit import PromptSession
from prompt_toolkit.application import create_app_session, get_app, run_in_terminal
from prompt_toolkit.application.current import set_app
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, has_focus, is_searching
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import History
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output.plain_text import PlainTextOutput
from prompt_toolkit.utils import is_dumb_terminal

from streamchat.base.errors import ConfigError
from streamchat.base.sanitize import one_line, printable
from streamchat.config.keymap import display_keys, keys_of
from streamchat.frontend import editor, mentions
from streamchat.frontend.slash.registry import SlashContext, SlashRegistry
from streamchat.frontend.suspend import stop_process
from streamchat.repl.keys import sequences
from streamchat.repl.terminal import STYLE

PROMPT = "you> "


class MessageCompleter(Completer):
    """Completes commands and their arguments after a slash, and paths after an @."""

    def __init__(self, registry: SlashRegistry, context: SlashContext) -> None:
        self._registry, self._context = registry, context

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Completions for the text before the cursor."""
        path = mentions.partial_mention(document.current_line_before_cursor)
        if path is not None:
            for whole, note in mentions.complete_path(path):
                yield Completion(whole, start_position=-len(path), display_meta=note)
            return
        text = document.text_before_cursor
        if "\n" in document.text or document.text_after_cursor:
            return
        for whole, note in self._registry.completions(self._context, text):
            yield Completion(whole, start_position=-len(text), display_meta=note)


class InputLine:
    """Reads one message at a time.

    Args:
        toolbar: Returns the text under the prompt for the number of terminal columns.
        keys: The `[keys]` table of the configuration.
    """

    def __init__(
        self,
        registry: SlashRegistry,
        context: SlashContext,
        history: History,
        toolbar: Callable[[int], str],
        keys: Mapping[str, str] | None = None,
    ) -> None:
        self._toolbar, self._keys = toolbar, keys or {}
        self._quit_armed = False
        self._error: BaseException | None = None
        interrupt = display_keys(keys_of("chat.interrupt", self._keys)[0])
        self.quit_hint = f"press {interrupt} again or Ctrl+D to quit"
        # otherwise cursor escape codes are written to a dumb terminal
        plain = create_app_session(output=PlainTextOutput(sys.stdout)) if is_dumb_terminal() else nullcontext()
        with plain:
            self.session = self._session(history, MessageCompleter(registry, context))
        self.session.default_buffer.on_text_changed += self._disarm

    def _session(self, history: History, completer: Completer) -> PromptSession[str]:
        return PromptSession(
            message=FormattedText([("class:you", PROMPT)]),
            multiline=True,
            prompt_continuation=lambda width, line, wrapped: " " * width,
            style=STYLE,
            history=history,
            completer=completer,
            # conditional, because prompt-toolkit reserves room for the menu otherwise
            complete_while_typing=Condition(self._completes),
            auto_suggest=AutoSuggestFromHistory(),
            key_bindings=self._bindings(),
            bottom_toolbar=self._toolbar_text,
            tempfile_suffix=".md",
        )

    async def ask(self, default: str = "") -> str | None:
        """Read a message, starting from the text `default`; None if the user quits."""
        self._quit_armed = False
        while True:
            try:
                with self.session.input.raw_mode():  # a dumb terminal shows the prompt before prompt-toolkit does this
                    return await self.session.prompt_async(default=default, pre_run=self._end_if_failed)
            except EOFError:
                return None
            except KeyboardInterrupt:  # on a dumb terminal only prompt-toolkit's built-in keys work
                if self._quit_armed:
                    return None
                self._quit_armed = True
                print(self.quit_hint, flush=True)

    def redraw(self) -> None:
        """Redraw the toolbar if a prompt is active."""
        if self.session.app.is_running:
            self.session.app.invalidate()

    def suspend(self, group: bool = False) -> bool:
        """Suspend the process until the shell continues it; False if no prompt is active.

        Args:
            group: Stop the whole process group (the pipeline), as Ctrl+Z does.
        """
        app = self.session.app
        if not app.is_running or app.is_done:
            return False
        with set_app(app):
            app.create_background_task(self._stopped(group))
        return True

    async def _stopped(self, group: bool) -> None:
        await run_in_terminal(lambda: stop_process(group))

    def end(self, error: BaseException) -> None:
        """Make the active or the next `ask` raise `error`."""
        self._error = error
        if self.session.app.is_running and not self.session.app.is_done:
            self.session.app.exit(exception=error)

    def _end_if_failed(self) -> None:
        if self._error is not None:
            self.session.app.exit(exception=self._error)

    def _toolbar_text(self) -> str:
        if self._quit_armed:
            return f" {self.quit_hint}"
        return self._toolbar(get_app().output.get_size().columns)

    def _completes(self) -> bool:
        document = self.session.default_buffer.document
        line = document.current_line_before_cursor
        return document.text.startswith("/") or mentions.partial_mention(line) is not None

    def _bindings(self) -> KeyBindings:
        bindings = KeyBindings()
        at_message = has_focus(DEFAULT_BUFFER) & ~is_searching

        def bind(key_id: str, handler: Callable[[KeyPressEvent], object], *more: tuple[str, ...]) -> None:
            eager = key_id in self._keys  # otherwise Ctrl+X waits for a second key of an Emacs binding
            for sequence in (*sequences(key_id, self._keys), *more):
                bindings.add(*sequence, filter=at_message, eager=eager)(handler)

        def send(event: KeyPressEvent) -> None:
            if event.current_buffer.text.strip():
                event.current_buffer.validate_and_handle()

        def newline(event: KeyPressEvent) -> None:
            event.current_buffer.newline(copy_margin=False)

        def clear_or_quit(event: KeyPressEvent) -> None:
            if event.current_buffer.text:
                event.current_buffer.save_to_undo_stack()
                event.current_buffer.document = Document()
            elif self._quit_armed:
                event.app.exit(exception=EOFError())
            else:
                self._quit_armed = True

        def edit(event: KeyPressEvent) -> None:
            event.app.create_background_task(self._edit(event.current_buffer))

        def stop(event: KeyPressEvent) -> None:
            self.suspend(group=True)

        if hasattr(signal, "SIGTSTP"):
            bindings.add("c-z", filter=at_message, eager=True)(stop)
        # an Enter that does not send inserts a new line, as in the app
        bindings.add("enter", filter=at_message)(newline)
        bind("prompt.send", send)
        bind("prompt.newline", newline)
        bind("chat.interrupt", clear_or_quit, ("<sigint>",))
        bind("prompt.edit", edit, ("c-x", "c-e"))
        return bindings

    async def _edit(self, buffer: Buffer) -> None:
        """Edit the message in the user's editor."""

        def write() -> str | None:
            try:
                return printable(editor.edit(buffer.text))
            except ConfigError as error:
                print(one_line(str(error)), flush=True)
                return None

        text = await run_in_terminal(write, in_executor=True)
        if text is not None:
            buffer.document = Document(text, len(text))

    def _disarm(self, *_: object) -> None:
        self._quit_armed = False
