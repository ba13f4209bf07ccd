"""The chat screen: conversation, status panel, input."""

from __future__ import annotations

from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical
from textual.css.query import NoMatches
from textual.widget import MountError
from textual.widgets import Footer

from streamchat.base import events as ev
from streamchat.base.requests import Pin, Stop, Unpin
from streamchat.base.sanitize import one_line, printable, without_blank_ends
from streamchat.frontend.outbox import Outbox, Phase
from streamchat.frontend.slash import registry
from streamchat.tui.bridge import EventBridge
from streamchat.tui.catch_up import collapse_turns
from streamchat.tui.clipboard import SENT
from streamchat.tui.command_runner import CommandRunner
from streamchat.tui.finders import Finders
from streamchat.tui.history import PromptHistory
from streamchat.tui.host import ChatHost
from streamchat.tui.messages import EventsArrived
from streamchat.tui.narrator import Narrator
from streamchat.tui.screens.keys import CHAT_KEYS
from streamchat.tui.screens.reading import ReadingScreen
from streamchat.tui.sender import Sender
from streamchat.tui.transcript import FinishedTurn
from streamchat.tui.widgets.composer import Composer
from streamchat.tui.widgets.context_map import ContextMap
from streamchat.tui.widgets.conversation import Conversation
from streamchat.tui.widgets.prompt import Prompt
from streamchat.tui.widgets.queue_panel import QueuePanel
from streamchat.tui.widgets.status_line import StatusLine
from streamchat.tui.widgets.status_panel import StatusPanel

FRAME_S = 1 / 12
"""Minimum seconds between two batches of events."""


class ChatScreen(ReadingScreen):
    """Handles events from the bridge, and messages and commands from the input. `StreamchatApp` loads its styles.

    `Composer` owns the input, `Sender` the queue, `CommandRunner` the slash commands, `Finders` the two lists.
    """

    BINDINGS: ClassVar[list[BindingType]] = CHAT_KEYS

    def __init__(self, app: ChatHost, bridge: EventBridge, outbox: Outbox, history: PromptHistory) -> None:
        super().__init__()
        self.chat_app = app
        self._bridge, self._outbox, self._history = bridge, outbox, history
        self._composer = Composer(app, history)
        self.queue_panel = QueuePanel(id="queue")
        self._sender = Sender(outbox, self)
        self._commands = CommandRunner(outbox, self._sender, self)
        self._finders = Finders(outbox, self)
        self._reading: ev.PrefillProgress | None = None
        self._narrator: Narrator | None = None
        self._keys_shown: tuple[Phase, bool] | None = None

    def compose(self) -> ComposeResult:
        """Conversation and input on the left, sidebar on the right, key hints below."""
        with Horizontal(id="body"):
            with Vertical(id="main"):
                yield Conversation(id="conversation")
                yield self.queue_panel
                yield self._composer
            yield StatusPanel(id="sidebar")
        yield StatusLine(id="status-line")
        yield Footer()

    async def on_mount(self) -> None:
        """Show what is known before the first event; events may already be pending."""
        self.conversation.thinking = self.chat_app.engine.settings.thinking
        self._narrator = Narrator(self.conversation, self._toast_unseen)
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
        return self._composer.prompt

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
                await self._sender.engine_idle()
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
                if self._outbox.phase is Phase.LOADING:  # else a turn that was sent meanwhile follows
                    await self._sender.engine_idle()
            case ev.Notice(level="error") if self._outbox.phase is Phase.LOADING and self.chat_app.board.info:
                await self._sender.engine_idle()  # /model failed
            case ev.SettingChanged(name="thinking"):
                self.conversation.thinking = self.chat_app.engine.settings.thinking
            case ev.TurnUndone(to_edit=True, text=text) | ev.ConversationResumed(restored_message=text) if text:
                self.prompt.restore_text(self.chat_app.registry.escape(text))
            case ev.SummaryReady(text=text) if text:
                self.prompt.restore_text(f"/keep {printable(text)}")
            case ev.TextCounted():
                self._composer.counted(event)
            case ev.TurnFinished():
                self._reading = None
                if event.rolled_back:
                    await self._sender.restore(event)
                await self._sender.engine_idle()
            case ev.EngineFailed():
                self._reading = None
                self._outbox.failed()
                self._sender.refresh()
                self.chat_app.engine_failed(event)
            case _:
                pass

    def _show_figures(self) -> None:
        board = self.chat_app.board
        self.query_one(StatusPanel).show(board, self._reading)
        self.query_one(StatusLine).show(board, self._reading)
        self.show_keys()

    def show_keys(self) -> None:
        """Show the keys that work now. The footer is redrawn only if they changed: that costs as much as a frame."""
        self._composer.show_hint()
        state = (self._outbox.phase, self._can_stop)
        if state != self._keys_shown:
            self._keys_shown = state
            self.refresh_bindings()

    def _toast_unseen(self, text: str, level: str) -> None:
        """Repeat a line of the conversation as a toast if its end is not on the screen."""
        if not (self.conversation.following and self.is_active):
            self.toast(text, level)

    # --- messages and commands of the user ------------------------------------------------------------------

    @on(Prompt.Submitted)
    async def _submitted(self, message: Prompt.Submitted) -> None:
        message.stop()
        typed = without_blank_ends(message.text)
        if registry.parse(typed) is not None:
            await self._sender.end_edit(empty=False)  # the input may have the start of the next message
            done = await self._commands.run(typed.strip())
        else:
            done = await self._sender.send(typed, self.chat_app.registry.unescape(typed))
        if done:
            self.prompt.remember(message.text)
        else:
            self.prompt.restore_text(message.text)

    async def show_sent(self, text: str) -> None:
        """Show a message in the conversation when it is sent."""
        assert self._narrator is not None
        await self._narrator.send(text)

    def run_slash(self, text: str) -> None:
        """Run a command as if the user had typed it."""
        self.run_worker(self._commands.run(text))

    @on(Prompt.SubmittedBlank)
    async def _submitted_blank(self) -> None:
        await self._sender.enter_blank()

    @on(Prompt.QueueStepped)
    async def _queue_stepped(self, message: Prompt.QueueStepped) -> None:
        if message.keystrokes == self.prompt.keystrokes:
            await self._sender.step(message.by)

    async def action_queue_drop(self) -> None:
        """Remove the queued message being edited, or the newest one."""
        await self._sender.drop()

    async def action_queue_clear(self) -> None:
        """Remove all queued messages."""
        await self._sender.clear()

    def action_sessions(self, words: str = "") -> None:
        """Choose a session to resume."""
        self._finders.sessions(words)

    def action_recall(self, words: str = "") -> None:
        """Search all messages and quote one to the model."""
        self._finders.recall(words)

    def action_edit(self) -> None:
        """Write the message in the user's editor."""
        self._composer.open_editor()

    @on(Prompt.QuitRequested)
    async def _quit(self) -> None:
        await self.chat_app.action_quit()

    @on(Prompt.EndPressed)
    def _end_pressed(self) -> None:
        self.conversation.follow()

    @on(Conversation.Scrolled)
    def _scrolled(self, message: Conversation.Scrolled) -> None:
        message.stop()
        self._composer.show_following(self.conversation.following)

    @on(ContextMap.PinRequested)
    def _pin_turn(self, message: ContextMap.PinRequested) -> None:
        message.stop()
        self.chat_app.engine.send(Pin(message.turn) if message.pinned else Unpin(message.turn))

    @on(ContextMap.Closed)
    def _back_to_input(self) -> None:
        self.leave_map()
        self.prompt.focus()

    # --- stopping -------------------------------------------------------------------------------------------

    @property
    def _can_stop(self) -> bool:
        """Whether Esc does something: a reply runs, messages are sent on their own, or one of them is edited."""
        return self._outbox.phase is Phase.REPLYING or self._outbox.waiting > 0 or self._outbox.edited is not None

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Show the stop key only if there is something to stop."""
        return self._can_stop if action == "stop" else True

    async def action_stop(self) -> None:
        """End the edit of a queued message, if any; else stop the reply and hold the queued messages."""
        if self._outbox.edited is not None:
            await self._sender.end_edit()
        else:
            self.stop_reply()

    def stop_reply(self) -> None:
        """Stop the reply and hold the queued messages."""
        self._sender.hold()
        if self._outbox.phase is Phase.REPLYING:
            self.chat_app.engine.send(Stop())
            if self._narrator is not None and self._narrator.current is not None:
                self._narrator.current.set_status("stopping")

    async def action_interrupt(self) -> None:
        """Ctrl+C: copy the selection, else stop the reply, else clear the input, else quit on a second press."""
        selected = self.prompt.selected_text or self.get_selected_text()
        if selected:
            self.app.copy_to_clipboard(selected)
            self.clear_selection()
            self.prompt.selection = self.prompt.selection.cursor(self.prompt.selection.end)
            self.toast(f"selection {SENT}", "information")
        elif self._outbox.phase is Phase.REPLYING:
            self.stop_reply()
        elif self._outbox.edited is not None:
            await self._sender.end_edit()
        elif self.prompt.text:
            self.prompt.empty()
        else:
            self.chat_app.action_interrupt()
