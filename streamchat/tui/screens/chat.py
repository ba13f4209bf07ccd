"""The chat screen: conversation, status panel, input."""

from __future__ import annotations

import time
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical
from textual.css.query import NoMatches
from textual.timer import Timer
from textual.widget import MountError
from textual.widgets import Footer

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError
from streamchat.base.requests import CountTokens, Pin, Quote, Stop, Unpin
from streamchat.base.sanitize import one_line, printable, without_blank_ends
from streamchat.config.keymap import key_names
from streamchat.frontend import mentions
from streamchat.frontend.messages import QUOTE_REPLY, quote_prompt
from streamchat.frontend.slash import registry
from streamchat.frontend.slash.session_commands import turn_done
from streamchat.tui.bindings import hint
from streamchat.tui.bridge import EventBridge
from streamchat.tui.catch_up import collapse_turns
from streamchat.tui.clipboard import SENT
from streamchat.tui.editor import edit
from streamchat.tui.history import PromptHistory
from streamchat.tui.host import ChatHost
from streamchat.tui.measure import MessageSize
from streamchat.tui.messages import EventsArrived
from streamchat.tui.narrator import Narrator
from streamchat.tui.outbox import Message, Outbox, Phase, SendResult
from streamchat.tui.screens.finder import RecallChoice, RecallScreen, SessionsScreen
from streamchat.tui.screens.keys import CHAT_KEYS
from streamchat.tui.screens.reading import ReadingScreen
from streamchat.tui.transcript import FinishedTurn
from streamchat.tui.widgets.completion import Completions
from streamchat.tui.widgets.context_map import ContextMap
from streamchat.tui.widgets.conversation import Conversation
from streamchat.tui.widgets.lines import CommandOutput
from streamchat.tui.widgets.prompt import Prompt
from streamchat.tui.widgets.queued_message import QueuedMessage
from streamchat.tui.widgets.status_line import StatusLine
from streamchat.tui.widgets.status_panel import StatusPanel

FRAME_S = 1 / 12
"""Minimum seconds between two batches of events."""
PAUSE_S = 0.4
"""Seconds without a key press before the text is measured."""


class ChatScreen(ReadingScreen):
    """Handles events from the bridge, and messages and commands from the input. `StreamchatApp` loads its styles."""

    BINDINGS: ClassVar[list[BindingType]] = CHAT_KEYS

    def __init__(self, app: ChatHost, bridge: EventBridge, outbox: Outbox, history: PromptHistory) -> None:
        super().__init__()
        self.chat_app = app
        self._bridge, self._outbox, self._history = bridge, outbox, history
        self._reading: ev.PrefillProgress | None = None
        self._narrator: Narrator | None = None
        self._hint = self._end_hint = ""
        self._keys_shown: tuple[Phase, bool] | None = None
        self._message_size = MessageSize(lambda text: self.chat_app.engine.send(CountTokens(text)))
        self._pause_timer: Timer | None = None

    def compose(self) -> ComposeResult:
        """Conversation and input on the left, sidebar on the right, key hints below."""
        completions = Completions(id="completions")
        with Horizontal(id="body"):
            with Vertical(id="main"):
                yield Conversation(id="conversation")
                yield QueuedMessage(id="queued")
                yield completions
                yield Prompt(self._history, self._complete, completions, id="prompt")
            yield StatusPanel(id="sidebar")
        yield StatusLine(id="status-line")
        yield Footer()

    async def on_mount(self) -> None:
        """Make the input usable at once; events may already be pending."""
        prompt = self.query_one(Prompt)
        self._use_keys(prompt)
        prompt.display = not self.chat_app.watching
        prompt.disabled = self.chat_app.watching
        if prompt.display:
            prompt.focus()
        self.conversation.thinking = self.chat_app.engine.settings.thinking
        self._narrator = Narrator(self.conversation, self._toast)
        await self.conversation.show_system_prompt(self.chat_app.engine.settings.system_prompt)
        self._show_figures()
        if sentence := self.chat_app.config_notice:
            await self.conversation.add_notice(one_line(sentence), "warning")
        if self._history.problem:
            await self.conversation.add_notice(self._history.problem, "warning")
        self.post_message(EventsArrived())

    @property
    def prompt(self) -> Prompt:
        """The input."""
        return self.query_one(Prompt)

    # --- events of the engine -------------------------------------------------------------------------------

    async def on_events_arrived(self, message: EventsArrived) -> None:
        """Show pending events; check again after `FRAME_S` until there are none."""
        message.stop()
        if self._narrator is None:  # not mounted yet; `on_mount` posts this message again
            return
        events_ = self._bridge.drain()
        if not events_:
            return
        for event in events_:
            self.chat_app.board.apply(event)
        try:
            await self._show_events(events_)
        except (NoMatches, MountError):
            if self.is_attached and self.app.is_running:
                raise
            return  # the app is exiting and its widgets are unmounted
        self.set_timer(FRAME_S, lambda: self.post_message(EventsArrived()))

    async def _show_events(self, events_: list[ev.Event]) -> None:
        assert self._narrator is not None
        for event in collapse_turns(events_, running=self._narrator.current is not None):
            if isinstance(event, FinishedTurn):
                await self.conversation.skip(event)
                continue
            await self._narrator.show(event)
            await self._follow_up(event)
            if self._outbox.is_done(event) and not isinstance(event, ev.TurnFinished):
                await self._engine_idle()
        if any(not isinstance(event, ev.TextDelta) for event in events_):
            await self.conversation.show_visibility(self.chat_app.board.cache)
            self._show_figures()

    async def _follow_up(self, event: ev.Event) -> None:
        """Update queue, input and app for an event."""
        match event:
            case ev.PrefillProgress(done=done, total=total):
                self._reading = event if done < total else None
            case ev.ModelLoading():
                self._outbox.loading()
            case ev.ModelReady():
                self.chat_app.model_ready()
                await self._engine_idle()
            case ev.Notice(level="error") if self._outbox.phase is Phase.LOADING and self.chat_app.board.info:
                await self._engine_idle()  # /model failed
            case ev.SettingChanged(name="thinking"):
                self.conversation.thinking = self.chat_app.engine.settings.thinking
            case ev.TurnUndone(to_edit=True, text=text) | ev.ConversationResumed(restored_message=text) if text:
                self.prompt.restore_text(self.chat_app.registry.escape(text))
            case ev.SummaryReady(text=text) if text:
                self.prompt.restore_text(f"/keep {printable(text)}")
            case ev.TextCounted(text=text, tokens=tokens):
                self._message_size.counted(text, tokens)
                self._show_size()
            case ev.TurnFinished():
                self._reading = None
                if event.rolled_back:
                    await self._restore_rolled_back(event)
                await self._engine_idle()
            case ev.EngineFailed():
                self._reading = None
                self._restore_queued(self._outbox.failed())
                self.chat_app.engine_failed(event)
            case _:
                pass

    async def _engine_idle(self) -> None:
        text = self._outbox.idle()
        if text is not None:
            await self._narrate(text)
        self._show_queued()

    async def _restore_rolled_back(self, event: ev.TurnFinished) -> None:
        """Restore the message of a turn that was rolled back to the input or the history."""
        if self.prompt.is_blank:
            self.prompt.put(self._outbox.typed(event.text))
            where = "back in the input"
        else:
            where = "in the history (Up)"
        await self.conversation.add_notice(f"Your message is {where}.")

    def _show_figures(self) -> None:
        board = self.chat_app.board
        self.query_one(StatusPanel).show(board, self._reading)
        self.query_one(StatusLine).show(board, self._reading)
        self._show_keys()

    def _show_keys(self) -> None:
        """Redraw the footer, but only if other keys work now: redrawing costs as much as a frame."""
        state = (self._outbox.phase, self._outbox.queued is not None)
        if state != self._keys_shown:
            self._keys_shown = state
            self.refresh_bindings()

    # --- messages and commands of the user ------------------------------------------------------------------

    @on(Prompt.Submitted)
    async def _submitted(self, message: Prompt.Submitted) -> None:
        message.stop()
        typed = without_blank_ends(message.text)
        command = registry.parse(typed)
        if command is not None:
            done = await self._run_command(command[0], typed.strip())
        else:
            done = await self._send(typed, self.chat_app.registry.unescape(typed))
        if done:
            self.prompt.remember(message.text)
        else:
            self.prompt.restore_text(message.text)

    async def _send(self, typed: str, text: str) -> bool:
        """Send `text` with the files that it mentions; on failure shows a toast and returns False."""
        try:
            expanded = mentions.expand(text)
        except ConfigError as error:
            self._toast(str(error), "error")
            return False
        sent = self._outbox.offer(Message(typed, expanded.text))
        if sent is not SendResult.REFUSED and expanded.notice:
            await self.conversation.add_notice(expanded.notice, "warning")
        match sent:
            case SendResult.SENT:
                await self._narrate(expanded.text)
            case SendResult.QUEUED:
                self._show_queued()
            case SendResult.REFUSED if self._outbox.phase is Phase.FAILED:
                self._toast(f"the engine has stopped; press {hint(self.app, 'app.quit')} to quit", "error")
            case SendResult.REFUSED:
                self._toast("one message is already queued; this one stays in the input", "warning")
        return sent is not SendResult.REFUSED

    async def _narrate(self, text: str) -> None:
        assert self._narrator is not None
        await self._narrator.send(text)
        self._show_keys()

    def run_slash(self, text: str) -> None:
        """Run a command as if the user had typed it."""
        command = registry.parse(text)
        assert command is not None
        self.run_worker(self._run_command(command[0], text))

    async def _run_command(self, name: str, text: str) -> bool:
        """Run a command; on failure shows a toast and returns False."""
        app = self.chat_app
        command = app.registry.find(name)
        parsed = registry.parse(text)
        starts_over = command is not None and parsed is not None and command.starts_over(parsed[1])
        asks = starts_over or (command is not None and command.asks_engine)
        if asks and self._outbox.phase is Phase.FAILED:
            self._toast(f"the engine has stopped; press {hint(self.app, 'app.quit')} to quit", "error")
            return False
        if command is not None and command.needs_idle and self._outbox.phase is not Phase.IDLE:
            why = "the model is not ready yet" if self._outbox.phase is Phase.LOADING else "a reply is in progress"
            self._toast(f"/{command.name} is not available: {why}", "warning")
            return False
        if starts_over and self._outbox.phase is Phase.REPLYING:
            app.engine.send(Stop())  # otherwise the reply would be completed first
        result = app.registry.run(registry.SlashContext(app.engine, app.board), text)
        assert result is not None
        if result.error:
            self._toast(result.text, "error")
            return False
        if result.message:
            return await self._send(text, result.message)
        if result.done_when is not None:
            self._outbox.begin_command(result.done_when)
            self._show_keys()
        if result.insert:
            self.prompt.restore_text(result.insert)
        if result.text:
            await self.conversation.add(CommandOutput(text, result.text))
            self.conversation.follow()
        if result.quit:
            await app.action_quit()
        return True

    # --- sessions and search -------------------------------------------------------------------------------

    def action_sessions(self, words: str = "") -> None:
        """Choose a session to resume."""
        if self.chat_app.watching:
            return

        def resume(session: str | None) -> None:
            if session is not None:
                self.run_slash(f"/resume {session}")

        self.app.push_screen(SessionsScreen(words, self.chat_app.board.session), resume)

    def action_recall(self, words: str = "") -> None:
        """Search all messages and quote one to the model."""
        if self.chat_app.watching:
            return

        def quote(choice: RecallChoice | None) -> None:
            if choice is None:
                return
            if self._outbox.phase is not Phase.IDLE:
                self._toast("the model is busy; try again when it is ready", "warning")
                return
            self._outbox.begin_command(turn_done)
            text = quote_prompt(choice.found, time.time())
            self.chat_app.engine.send(Quote(text, QUOTE_REPLY, choice.action == "keep"))
            self._show_keys()

        thinking = self.chat_app.engine.settings.thinking
        self.app.push_screen(RecallScreen(words, self.chat_app.board.session, thinking), quote)

    def _complete(self, text: str) -> list[tuple[str, str]]:
        if text.startswith("/"):
            app = self.chat_app
            return app.registry.completions(registry.SlashContext(app.engine, app.board), text)
        path = mentions.partial_mention(text)
        if path is None:
            return []
        before = text[: len(text) - len(path)]
        return [(before + whole, note) for whole, note in mentions.complete_path(path)]

    def _show_queued(self) -> None:
        until = "until the model is ready" if self._outbox.phase is Phase.LOADING else "until this reply is done"
        queued = self._outbox.queued
        self.query_one(QueuedMessage).offer(queued.typed if queued else None, until)
        self.prompt.has_queued_message = queued is not None
        self._show_keys()

    def _restore_queued(self, text: str | None) -> None:
        if text is not None:
            self.prompt.restore_text(text)
        self._show_queued()

    # --- the input ------------------------------------------------------------------------------------------

    def _use_keys(self, prompt: Prompt) -> None:
        prompt.send_keys = key_names(self.chat_app.keys_of("prompt.send"))
        self._hint = f"{hint(self.app, 'prompt.send')} sends · {hint(self.app, 'prompt.newline')} new line"
        prompt.border_subtitle = self._hint
        self._end_hint = f"▾ scrolled back · {hint(self.app, 'chat.follow')} jumps to the end"

    @on(Prompt.Edited)
    def _edited(self, message: Prompt.Edited) -> None:
        """Measure the text when the user pauses."""
        message.stop()
        if self._pause_timer is not None:
            self._pause_timer.stop()
        self._pause_timer = self.set_timer(PAUSE_S, self._measure)
        self._show_size()

    def _measure(self) -> None:
        self._message_size.measure(self.prompt.text)
        self._show_size()

    def _show_size(self) -> None:
        """Show the size of a long text: an estimate until the engine has counted its tokens."""
        words = self._message_size.summary(self.prompt.text, self.chat_app.board.cache)
        self.prompt.border_subtitle = words or self._hint

    @on(Prompt.EditorRequested)
    def action_edit(self) -> None:
        """Write the message in the user's editor."""
        try:
            self.prompt.put(edit(self.app, self.prompt.text))
        except ConfigError as error:
            self._toast(str(error), "error")

    @on(Prompt.RecallQueued)
    def _recall_queued(self) -> None:
        self._restore_queued(self._outbox.recall_queued())

    @on(Prompt.QuitRequested)
    async def _quit(self) -> None:
        await self.chat_app.action_quit()

    @on(Prompt.EndPressed)
    def _end_pressed(self) -> None:
        self.conversation.follow()

    @on(Conversation.Scrolled)
    def _scrolled(self, message: Conversation.Scrolled) -> None:
        """Show how to jump to the end while the view is scrolled back."""
        message.stop()
        self.prompt.border_title = "" if self.conversation.following else self._end_hint

    @on(ContextMap.PinRequested)
    def _pin_turn(self, message: ContextMap.PinRequested) -> None:
        message.stop()
        self.chat_app.engine.send(Pin(message.turn) if message.pinned else Unpin(message.turn))

    @on(ContextMap.Closed)
    def _back_to_input(self) -> None:
        self.prompt.focus()

    # --- actions --------------------------------------------------------------------------------------------

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Show the stop key only if there is something to stop."""
        if action == "stop":
            return self._outbox.phase is Phase.REPLYING or self._outbox.queued is not None
        return True

    def action_stop(self) -> None:
        """Stop the reply; a queued message returns to the input."""
        self._restore_queued(self._outbox.recall_queued())
        if self._outbox.phase is Phase.REPLYING:
            self.chat_app.engine.send(Stop())
            if self._narrator is not None and self._narrator.current is not None:
                self._narrator.current.set_status("stopping")

    def action_interrupt(self) -> None:
        """Ctrl+C: copy the selection, else stop the reply, else clear the input, else quit on a second press."""
        selected = self.prompt.selected_text or self.get_selected_text()
        if selected:
            self.app.copy_to_clipboard(selected)
            self.clear_selection()
            self.prompt.selection = self.prompt.selection.cursor(self.prompt.selection.end)
            self._toast(f"selection {SENT}", "information")
        elif self._outbox.phase is Phase.REPLYING:
            self.action_stop()
        elif self.prompt.text:
            self.prompt.empty()
        else:
            self.chat_app.action_interrupt()
