"""The screen where one chats: conversation, status panel, input."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, ClassVar, cast

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
from streamchat.base.sanitize import one_line, printable, without_blank_ends
from streamchat.config.keymap import key_names
from streamchat.frontend import mentions
from streamchat.frontend.messages import ACKNOWLEDGED, quoted
from streamchat.frontend.slash import registry
from streamchat.frontend.slash.session_commands import turn_over
from streamchat.telemetry.log_file import log_path
from streamchat.tui.bindings import hint
from streamchat.tui.bridge import EventBridge
from streamchat.tui.catch_up import caught_up
from streamchat.tui.clipboard import SENT
from streamchat.tui.editor import edit
from streamchat.tui.history import PromptHistory
from streamchat.tui.measure import MessageSize
from streamchat.tui.messages import EventsArrived
from streamchat.tui.narrator import Narrator
from streamchat.tui.outbox import Message, Outbox, Phase, Sent
from streamchat.tui.past import PastTurn
from streamchat.tui.screens.finder import Recalled, RecallScreen, SessionsScreen
from streamchat.tui.screens.keys import CHAT_KEYS
from streamchat.tui.screens.reading import ReadingScreen
from streamchat.tui.widgets.completion import Completions
from streamchat.tui.widgets.conversation import Conversation
from streamchat.tui.widgets.lines import CommandOutput
from streamchat.tui.widgets.memory_map import MemoryMap
from streamchat.tui.widgets.prompt import Prompt
from streamchat.tui.widgets.status_line import StatusLine
from streamchat.tui.widgets.status_panel import StatusPanel
from streamchat.tui.widgets.waiting import WaitingMessage

if TYPE_CHECKING:
    from streamchat.tui.app import StreamchatApp

FRAME_S = 1 / 12
"""Least time between two batches of events on the screen."""
PAUSE_S = 0.4
"""After so long without a key the text is measured."""


class ChatScreen(ReadingScreen):
    """Takes events from the bridge, messages and commands from the input. `StreamchatApp` names its style sheet."""

    BINDINGS: ClassVar[list[BindingType]] = CHAT_KEYS

    def __init__(self, bridge: EventBridge, outbox: Outbox, history: PromptHistory) -> None:
        super().__init__()
        self._bridge, self._outbox, self._history = bridge, outbox, history
        self._reading: ev.PrefillProgress | None = None
        self._narrator: Narrator | None = None
        self._hint = self._end_hint = ""
        self._keys_shown: tuple[Phase, bool] | None = None
        self._message_size = MessageSize(lambda text: self.chat_app.engine.count_tokens(text))
        self._pause_timer: Timer | None = None

    @property
    def chat_app(self) -> StreamchatApp:
        """The app, with its type."""
        from streamchat.tui.app import StreamchatApp

        return cast(StreamchatApp, self.app)

    def compose(self) -> ComposeResult:
        """Conversation and input on the left, sidebar on the right, keys below."""
        completions = Completions(id="completions")
        with Horizontal(id="body"):
            with Vertical(id="main"):
                yield Conversation(id="conversation")
                yield WaitingMessage(id="waiting")
                yield completions
                yield Prompt(self._history, self._complete, completions, id="prompt")
            yield StatusPanel(id="sidebar")
        yield StatusLine(id="status-line")
        yield Footer()

    async def on_mount(self) -> None:
        """Be usable at once; events may wait already."""
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
        if sentence := self.chat_app.folder_sentence:
            await self.conversation.say(one_line(sentence), "warning")
        if self._history.problem:
            await self.conversation.say(self._history.problem, "warning")
        self.post_message(EventsArrived())

    @property
    def prompt(self) -> Prompt:
        """The input."""
        return self.query_one(Prompt)

    # --- events of the engine -------------------------------------------------------------------------------

    async def on_events_arrived(self, message: EventsArrived) -> None:
        """Show what happened, then look again a frame later until nothing more comes."""
        message.stop()
        if self._narrator is None:  # not mounted yet; asks again then
            return
        events_ = self._bridge.take()
        if not events_:
            return
        for event in events_:
            self.chat_app.board.apply(event)
        try:
            await self._show_events(events_)
        except (NoMatches, MountError):
            if self.is_attached and self.app.is_running:
                raise
            return  # the user has left meanwhile: widgets are taken down, and nothing can be drawn any more
        self.set_timer(FRAME_S, lambda: self.post_message(EventsArrived()))

    async def _show_events(self, events_: list[ev.Event]) -> None:
        assert self._narrator is not None
        for told in caught_up(events_, running=self._narrator.current is not None):
            if isinstance(told, PastTurn):
                await self.conversation.skip(told)
                continue
            await self._narrator.tell(told)
            await self._follow_up(told)
            if self._outbox.is_over(told) and not isinstance(told, ev.TurnFinished):
                await self._engine_idle()
        if any(not isinstance(event, ev.TextDelta) for event in events_):
            await self.conversation.show_memory(self.chat_app.board.cache)
            self._show_figures()

    async def _follow_up(self, event: ev.Event) -> None:
        """What an event means for sending, input and app."""
        match event:
            case ev.PrefillProgress(done=done, total=total):
                self._reading = event if done < total else None
            case ev.ModelLoading():
                self._outbox.loading()
            case ev.ModelReady():
                self.chat_app.model_ready()
                await self._engine_idle()
            case ev.Notice(level="error") if self._outbox.phase is Phase.LOADING and self.chat_app.board.info:
                await self._engine_idle()  # another model could not be loaded
            case ev.SettingChanged(name="thinking", value=value):
                self.conversation.thinking = value
            case ev.TurnUndone(to_edit=True, text=text) | ev.ConversationResumed(restored_message=text) if text:
                self.prompt.give_back(self.chat_app.registry.as_typed(text))
            case ev.SummaryReady(text=text) if text:
                self.prompt.give_back(f"/keep {printable(text)}")
                self._toast("the summary is in the input: change it as you like, Enter pins it", "information")
            case ev.TextCounted(text=text, tokens=tokens):
                self._message_size.counted(text, tokens)
                self._show_size()
            case ev.TurnFinished():
                self._reading = None
                if event.rolled_back:
                    await self._give_back(event)
                await self._engine_idle()
            case ev.EngineFailed():
                self._reading = None
                self._take_back(self._outbox.failed())
                self.chat_app.engine_failed(event)
            case _:
                pass

    async def _engine_idle(self) -> None:
        text = self._outbox.idle()
        if text is not None:
            await self._narrate(text)
        self._show_waiting()

    async def _give_back(self, event: ev.TurnFinished) -> None:
        """The turn is not part of the conversation; its text is the user's again."""
        if self.prompt.is_blank:
            self.prompt.put(self._outbox.typed(event.text))
            where = "your message is in the input again"
        else:
            where = "your message is in the history (Up)"
        if event.finish_reason == "cancelled":
            await self.conversation.say(f"Stopped before the reply began and taken back; {where}.")
        else:
            await self.conversation.say(f"The turn was taken back; {where}. The log is {log_path()}.")

    def _show_figures(self) -> None:
        board = self.chat_app.board
        self.query_one(StatusPanel).show(board, self._reading)
        self.query_one(StatusLine).show(board, self._reading)
        self._show_keys()

    def _show_keys(self) -> None:
        """Draw the footer anew where other keys work now: it costs as much as a frame."""
        state = (self._outbox.phase, self._outbox.waiting is not None)
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
            done = await self._send(typed, self.chat_app.registry.message_text(typed))
        if done:
            self.prompt.remember(message.text)
        else:
            self.prompt.give_back(message.text)

    async def _send(self, typed: str, text: str) -> bool:
        """Send `text` with the files that it mentions; False if that is not possible, and a toast says why."""
        try:
            expanded = mentions.expand(text)
        except ConfigError as error:
            self._toast(str(error), "error")
            return False
        sent = self._outbox.offer(Message(typed, expanded.text))
        if sent is not Sent.REFUSED and expanded.notice:
            await self.conversation.say(expanded.notice, "warning")
        match sent:
            case Sent.SENT:
                await self._narrate(expanded.text)
            case Sent.WAITS:
                self._show_waiting()
            case Sent.REFUSED if self._outbox.phase is Phase.FAILED:
                self._toast(f"the engine has ended; {hint(self.app, 'app.quit')} leaves", "error")
            case Sent.REFUSED:
                self._toast("one message waits already; this one stays in the input until it can be sent", "warning")
        return sent is not Sent.REFUSED

    async def _narrate(self, text: str) -> None:
        assert self._narrator is not None
        await self._narrator.send(text)
        self._show_keys()

    def run_slash(self, text: str) -> None:
        """Carry out a command as if it had been typed."""
        command = registry.parse(text)
        assert command is not None
        self.run_worker(self._run_command(command[0], text))

    async def _run_command(self, name: str, text: str) -> bool:
        """Carry out a command; False if it cannot be now, and a toast says why."""
        app = self.chat_app
        command = app.registry.find(name)
        parsed = registry.parse(text)
        starts_over = command is not None and parsed is not None and command.starts_over(parsed[1])
        asks = starts_over or (command is not None and command.asks_engine)
        if asks and self._outbox.phase is Phase.FAILED:
            self._toast(f"the engine has ended; {hint(self.app, 'app.quit')} leaves", "error")
            return False
        if command is not None and command.needs_idle and self._outbox.phase is not Phase.IDLE:
            why = "the model is not ready yet" if self._outbox.phase is Phase.LOADING else "a reply is being written"
            self._toast(f"/{command.name} has to wait: {why}", "warning")
            return False
        if starts_over and self._outbox.phase is Phase.REPLYING:
            app.engine.stop_reply()  # or it would run on to its end first
        result = app.registry.run(registry.SlashContext(app.engine, app.board), text)
        assert result is not None
        if result.error:
            self._toast(result.text, "error")
            return False
        if result.message:
            return await self._send(text, result.message)
        if result.over is not None:
            self._outbox.begin(result.over)
            self._show_keys()
        if result.insert:
            self.prompt.give_back(result.insert)
        if result.text:
            await self.conversation.add(CommandOutput(text, result.text, error=False))
            self.conversation.follow()
        if result.quit:
            await app.action_quit()
        return True

    # --- what was said, here and elsewhere ------------------------------------------------------------------

    def action_sessions(self, words: str = "") -> None:
        """Choose a saved conversation to go on with."""
        if self.chat_app.watching:
            return

        def go_on(session: str | None) -> None:
            if session is not None:
                self.run_slash(f"/resume {session}")

        self.app.push_screen(SessionsScreen(words, self.chat_app.board.session), go_on)

    def action_recall(self, words: str = "") -> None:
        """Find what was said, and put it before the model again."""
        if self.chat_app.watching:
            return

        def put(recalled: Recalled | None) -> None:
            if recalled is None:
                return
            if self._outbox.phase is not Phase.IDLE:
                self._toast("that has to wait until the model is ready for a message; find it again then", "warning")
                return
            self._outbox.begin(turn_over)
            text = quoted(recalled.found, time.time())
            self.chat_app.engine.quote(text, ACKNOWLEDGED, recalled.how == "keep")
            self._show_keys()

        thinking = self.chat_app.engine.settings.thinking
        self.app.push_screen(RecallScreen(words, self.chat_app.board.session, thinking), put)

    def _complete(self, text: str) -> list[tuple[str, str]]:
        if text.startswith("/"):
            app = self.chat_app
            return app.registry.completions(registry.SlashContext(app.engine, app.board), text)
        path = mentions.mention_under_way(text)
        if path is None:
            return []
        before = text[: len(text) - len(path)]
        return [(before + whole, note) for whole, note in mentions.complete_path(path)]

    def _show_waiting(self) -> None:
        until = "until the model is ready" if self._outbox.phase is Phase.LOADING else "until this reply is over"
        waiting = self._outbox.waiting
        self.query_one(WaitingMessage).offer(waiting.typed if waiting else None, until)
        self.prompt.message_waits = self._outbox.waiting is not None
        self._show_keys()

    def _take_back(self, text: str | None) -> None:
        if text is not None:
            self.prompt.give_back(text)
        self._show_waiting()

    # --- the input ------------------------------------------------------------------------------------------

    def _use_keys(self, prompt: Prompt) -> None:
        prompt.send_keys = key_names(self.chat_app.keys_of("prompt.send"))
        self._hint = f"{hint(self.app, 'prompt.send')} sends · {hint(self.app, 'prompt.newline')} new line"
        prompt.border_subtitle = self._hint
        self._end_hint = f"▾ you are reading back · {hint(self.app, 'chat.follow')} goes to the end"

    @on(Prompt.Edited)
    def _edited(self, message: Prompt.Edited) -> None:
        """The text is measured once the user pauses."""
        message.stop()
        if self._pause_timer is not None:
            self._pause_timer.stop()
        self._pause_timer = self.set_timer(PAUSE_S, self._measure)
        self._show_size()

    def _measure(self) -> None:
        self._message_size.measure(self.prompt.text)
        self._show_size()

    def _show_size(self) -> None:
        """Tokens of a long text against the budget, roughly until they are counted."""
        words = self._message_size.words(self.prompt.text, self.chat_app.board.cache)
        self.prompt.border_subtitle = words or self._hint

    @on(Prompt.EditorWanted)
    def action_edit(self) -> None:
        """Write the message in the user's editor."""
        try:
            self.prompt.put(edit(self.chat_app, self.prompt.text))
        except ConfigError as error:
            self._toast(str(error), "error")

    @on(Prompt.TookBack)
    def _took_back(self) -> None:
        self._take_back(self._outbox.take_back())

    @on(Prompt.Emptied)
    async def _leave(self) -> None:
        await self.chat_app.action_quit()

    @on(Prompt.EndPressed)
    def _end_pressed(self) -> None:
        self.conversation.follow()

    @on(Conversation.Scrolled)
    def _scrolled(self, message: Conversation.Scrolled) -> None:
        """Say where the end is while the reader is elsewhere."""
        message.stop()
        self.prompt.border_title = "" if self.conversation.following else self._end_hint

    @on(MemoryMap.PinWanted)
    def _pin_turn(self, message: MemoryMap.PinWanted) -> None:
        message.stop()
        engine = self.chat_app.engine
        (engine.pin if message.pinned else engine.unpin)(message.turn)

    @on(MemoryMap.Left)
    def _back_to_input(self) -> None:
        self.prompt.focus()

    # --- actions --------------------------------------------------------------------------------------------

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Show the stop key only while there is something to stop."""
        if action == "stop":
            return self._outbox.phase is Phase.REPLYING or self._outbox.waiting is not None
        return True

    def action_stop(self) -> None:
        """Stop the reply; a message that waits comes back into the input."""
        self._take_back(self._outbox.take_back())
        if self._outbox.phase is Phase.REPLYING:
            self.chat_app.engine.stop_reply()
            if self._narrator is not None and self._narrator.current is not None:
                self._narrator.current.ended("stopping")

    def action_interrupt(self) -> None:
        """Ctrl+C: copy what is selected, else stop the reply, else empty the input, else quit on the second press."""
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
