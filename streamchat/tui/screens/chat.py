"""The chat screen: conversation, status panel, input."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical
from textual.css.query import NoMatches
from textual.timer import Timer
from textual.widget import MountError

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError
from streamchat.base.requests import Pin, Stop, Unpin
from streamchat.base.sanitize import one_line, printable
from streamchat.frontend.outbox import Phase
from streamchat.tui.bridge import EventBridge
from streamchat.tui.catch_up import collapse_turns
from streamchat.tui.clipboard import SENT
from streamchat.tui.drawing import SparseCompositor
from streamchat.tui.pace import FramePace
from streamchat.tui.screens.commands import CommandScreen
from streamchat.tui.screens.keys import CHAT_KEYS
from streamchat.tui.screens.settings import SettingsScreen
from streamchat.tui.state import ChatState
from streamchat.tui.transcript import FinishedTurn
from streamchat.tui.widgets.context_map import ContextMap
from streamchat.tui.widgets.conversation import Conversation
from streamchat.tui.widgets.key_hints import KeyHints
from streamchat.tui.widgets.status_line import StatusLine
from streamchat.tui.widgets.status_panel import StatusPanel

BACKGROUND = (ev.TextDelta, ev.StatusSampled, ev.TokensEvicted)
"""Events whose figures may be shown a little later."""


class ChatScreen(CommandScreen):
    """Shows the events from the bridge, and handles the keys. `StreamchatApp` loads its styles.

    The base classes read, send, and run commands.

    Args:
        react: Called with each event after it is shown.
    """

    BINDINGS: ClassVar[list[BindingType]] = CHAT_KEYS

    def __init__(self, state: ChatState, bridge: EventBridge, react: Callable[[ev.Event], None]) -> None:
        super().__init__(state)
        self._bridge, self._react = bridge, react
        self._reading: ev.PrefillProgress | None = None
        self._compositor = SparseCompositor()
        self._pace = FramePace()
        self._next: Timer | None = None
        """Shows the next frame."""
        self._figures_changed = False

    def compose(self) -> ComposeResult:
        """Conversation and input on the left, sidebar on the right, key hints below."""
        with Horizontal(id="body"):
            with Vertical(id="main"):
                yield self.conversation
                yield self.queue_panel
                yield self.fetch_line
                yield self._composer
            yield StatusPanel(id="sidebar")
        yield StatusLine(id="status-line")
        yield KeyHints()

    async def on_mount(self) -> None:
        """Show what is known before the first event."""
        self.conversation.thinking = self.state.engine.settings.thinking
        await self.conversation.show_system_prompt(self.state.engine.settings.system_prompt)
        self._show_figures()
        sentence = self.state.configuration.local_notice
        if sentence and not self.state.watching:
            await self.conversation.add_notice(one_line(sentence), "warning")
        if self.state.history.problem:
            await self.conversation.add_notice(self.state.history.problem, "warning")

    # --- events of the engine -------------------------------------------------------------------------------

    async def show_pending(self) -> None:
        """Show pending events as one frame; check again after the interval of the pace until there are none."""
        events_ = self._bridge.drain()
        if not events_:
            self._pace.pause()
            if self._figures_changed:
                await self._show_state()
            return
        for event in events_:
            self.state.board.apply(event)
        try:
            await self._show_events(events_)
        except (NoMatches, MountError):
            if self.is_attached and self.app.is_running:
                raise
            return  # the app is exiting and its widgets are unmounted
        self._show_after(self._pace.interval(self.state.board.decode_tps))

    def show_soon(self) -> None:
        """Show pending events at once, or as soon as a frame may follow the last one."""
        self._show_after(self._pace.wait())

    def _show_after(self, seconds: float) -> None:
        if self._next is not None:
            self._next.stop()
            self._next = None
        if seconds > 0:
            self._next = self.set_timer(seconds, lambda: self.call_later(self.show_pending))
        else:
            self.call_later(self.show_pending)

    async def _show_events(self, events_: list[ev.Event]) -> None:
        for event in collapse_turns(events_, running=self._narrator.current is not None):
            if isinstance(event, FinishedTurn):
                await self.conversation.skip(event)
                continue
            await self._narrator.show(event)
            await self._follow_up(event)
            self._react(event)
            if self._outbox.is_done(event) and not isinstance(event, ev.TurnFinished):
                await self.engine_idle()
        self._figures_changed |= any(not isinstance(event, ev.TextDelta) for event in events_)
        if self._figures_changed and self._pace.figures_due(any(not isinstance(e, BACKGROUND) for e in events_)):
            await self._show_state()

    async def _show_state(self) -> None:
        """Show what is in context, and the figures."""
        self._figures_changed = False
        await self.conversation.show_visibility(self.state.board.cache)
        self._show_figures()

    async def _follow_up(self, event: ev.Event) -> None:
        """Update queue, input and the settings screen for an event."""
        self.state.settings.follow(event)
        self.state.switch.apply(event)
        if isinstance(self.app.screen, SettingsScreen):
            self.app.screen.show_event(event)
        match event:
            case ev.ModelFetching():
                self.show_keys()
            case ev.ModelFetched():
                self.load_fetched()
            case ev.PrefillProgress(done=done, total=total):
                self._reading = event if done < total else None
            case ev.ModelLoading():
                self._outbox.loading()
            case ev.ModelReady():
                if self._outbox.phase is Phase.LOADING:  # else a turn that was sent meanwhile follows
                    await self.engine_idle()
            case ev.Notice(level="error") if self._outbox.phase is Phase.LOADING and self.state.board.info:
                await self.engine_idle()  # /model failed
            case ev.SettingChanged(name="thinking"):
                self.conversation.thinking = self.state.engine.settings.thinking
            case ev.TurnUndone(to_edit=True, text=text) | ev.ConversationResumed(restored_message=text) if text:
                self.prompt.restore_text(self.state.registry.escape(text))
            case ev.SummaryReady(text=text) if text:
                self.prompt.restore_text(f"/keep {printable(text)}")
            case ev.TextCounted():
                self._composer.counted(event)
            case ev.TurnStarted() if not self.state.watching:
                self._outbox.started()
                self.show_keys()
            case ev.TurnFinished():
                self._reading = None
                if event.rolled_back and event.text:
                    await self.restore(event)
                if not self._outbox.waits_behind(event.text):
                    await self.engine_idle()
            case ev.EngineFailed():
                self._reading = None
                self._outbox.failed()
                self.show_queue()
            case _:
                pass

    def _show_figures(self) -> None:
        board = self.state.board
        self.query_one(StatusPanel).show(board, self._reading)
        self.query_one(StatusLine).show(board, self._reading)
        self.show_keys()

    # --- input, conversation and context map ------------------------------------------------------------------

    def action_edit(self) -> None:
        """Write the message in the user's editor."""
        try:
            self._composer.open_editor()
        except ConfigError as error:
            self.toast(str(error), "error")

    @on(Conversation.Scrolled)
    def _scrolled(self, message: Conversation.Scrolled) -> None:
        message.stop()
        self._composer.show_following(self.conversation.following)

    @on(ContextMap.PinRequested)
    def _pin_turn(self, message: ContextMap.PinRequested) -> None:
        message.stop()
        self.state.engine.send(Pin(message.turn) if message.pinned else Unpin(message.turn))

    @on(ContextMap.Closed)
    def _back_to_input(self) -> None:
        self.leave_map()
        self.prompt.focus()

    # --- stopping -------------------------------------------------------------------------------------------

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Show the stop key only if there is something to stop."""
        return self.can_stop if action == "stop" else True

    async def action_stop(self) -> None:
        """End the edit of a queued message; else stop the reply and hold the queued messages; else cancel the fetch."""
        if self._outbox.edited is not None:
            await self.end_edit()
        elif self.state.switch.is_active and not self.has_work:
            self.cancel_fetch()
        else:
            self.stop_reply()

    def cancel_fetch(self) -> None:
        """Cancel the fetch of a model."""
        self.state.switch.cancel()
        self.show_keys()

    def stop_reply(self) -> None:
        """Stop the reply and hold the queued messages."""
        self.hold()
        if self._outbox.phase is Phase.REPLYING:
            self.state.engine.send(Stop())
            if self._narrator.current is not None:
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
            await self.end_edit()
        elif self.prompt.text:
            self.prompt.empty()
        else:
            self.app.action_help_quit()
