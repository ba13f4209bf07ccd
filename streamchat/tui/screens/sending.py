"""The part of the chat screen that sends what the user writes, and shows and changes what is queued."""

from __future__ import annotations

from textual import on

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError
from streamchat.base.formatting import plural
from streamchat.base.sanitize import printable
from streamchat.frontend import mentions
from streamchat.frontend.outbox import Message, Phase, SendResult
from streamchat.frontend.slash.queue import shortened
from streamchat.tui.bindings import hint
from streamchat.tui.narrator import Narrator
from streamchat.tui.screens.reading import ReadingScreen
from streamchat.tui.state import ChatState
from streamchat.tui.widgets.composer import Composer
from streamchat.tui.widgets.fetch_line import FetchLine
from streamchat.tui.widgets.prompt import Prompt
from streamchat.tui.widgets.queue_panel import QueuePanel


class SendingScreen(ReadingScreen):
    """A screen that connects an `Outbox` with the input, the list of queued messages, and the conversation."""

    def __init__(self, state: ChatState) -> None:
        super().__init__()
        self.state = state
        self._outbox = state.outbox
        self._composer = Composer(state)
        self.queue_panel = QueuePanel()
        self.fetch_line = FetchLine()
        self._narrator = Narrator(self.conversation, self._toast_unseen)
        self._keys_shown: tuple[Phase, bool] | None = None

    @property
    def prompt(self) -> Prompt:
        """The input."""
        return self._composer.prompt

    async def send(self, typed: str, text: str) -> bool:
        """Send or queue `text` with the files that it mentions; on failure shows a toast and returns False."""
        try:
            expanded = mentions.expand(text)
        except ConfigError as error:
            self.toast(str(error), "error")
            return False
        sent = self._outbox.offer(Message(typed, expanded.text))
        if sent is SendResult.REFUSED:
            self.refuse()
            return False
        if expanded.notice:
            await self.conversation.add_notice(expanded.notice, "warning")
        if sent is SendResult.SENT:
            await self._narrator.send(expanded.text)
        self.show_queue()
        return True

    def refuse(self) -> None:
        """Tell the user that the engine has stopped."""
        self.toast(f"the engine has stopped; press {hint(self.app, 'app.quit')} to quit", "error")

    async def engine_idle(self) -> None:
        """Load the fetched model, or send the next message: the turn, the command or the loading has ended."""
        self._outbox.idle()
        self.load_fetched()
        await self.advance()

    def load_fetched(self) -> None:
        """Load the model that was fetched, if there is one and the engine is idle."""
        if self.state.switch.is_due and self._outbox.phase is Phase.IDLE:
            self.state.switch.load_fetched()
            self._outbox.loading()
        self.show_keys()

    async def advance(self) -> None:
        """Send the first queued message if it is due, and show the queue."""
        text = self._outbox.send_next()
        if text is not None:
            await self._narrator.send(text)
        self.show_queue()

    async def restore(self, event: ev.TurnFinished) -> None:
        """Return the message of a turn that was rolled back to the input, or hold it if the input is in use."""
        typed = self._outbox.typed(event.text)
        if event.finish_reason != "cancelled":  # a stop has already held what waited then; later messages are not held
            self._outbox.hold()
        if self.prompt.is_blank and self._outbox.edited is None:
            self.prompt.put(typed)
            where = "back in the input"
        else:
            self._outbox.put_back(Message(typed, event.text))
            where = "held in the queue"
        await self.conversation.add_notice(f"Your message is {where}.")

    # --- the queue, as the user sees it -------------------------------------------------------------------------

    def show_queue(self) -> None:
        """Show the queue and the keys that work with it."""
        self.queue_panel.show(self._outbox)
        self.prompt.has_queue = bool(self._outbox.queue)
        self.prompt.edits_queued = self._outbox.edited is not None
        self.show_keys()

    def show_keys(self) -> None:
        """Show the keys that work now, and the model that is being fetched.

        The footer is redrawn only if they changed: that costs as much as a frame.
        """
        self._composer.show_hint()
        can_cancel = not self.has_work and self._outbox.edited is None
        self.fetch_line.show_switch(self.state.switch, can_cancel=can_cancel)
        state = (self._outbox.phase, self.can_stop)
        if state != self._keys_shown:
            self._keys_shown = state
            self.refresh_bindings()

    @property
    def can_stop(self) -> bool:
        """Whether Esc does something: stop a reply or a fetch, hold messages that are sent, or end the edit of one."""
        return self.has_work or self._outbox.edited is not None or self.state.switch.is_active

    @property
    def has_work(self) -> bool:
        """Whether a reply runs, or messages are sent on their own."""
        return self._outbox.phase is Phase.REPLYING or self._outbox.waiting > 0

    def _toast_unseen(self, text: str, level: str) -> None:
        """Repeat a line of the conversation as a toast if its end is not on the screen."""
        if not (self.conversation.following and self.is_active):
            self.toast(text, level)

    # --- the queue, as the user handles it ----------------------------------------------------------------------

    def hold(self) -> None:
        """Hold all queued messages."""
        self._outbox.hold()
        self.show_queue()

    @on(Prompt.SubmittedBlank)
    async def _submitted_blank(self) -> None:
        """Enter in a blank input: send the held messages; during an edit, remove the message."""
        if self._outbox.edited is not None:
            await self.action_queue_drop()
            return
        self._outbox.resume()
        await self.advance()

    @on(Prompt.QueueStepped)
    async def _queue_stepped(self, message: Prompt.QueueStepped) -> None:
        """Edit the queued message before (-1) or after (1) the edited one; first the newest. Keeps a changed text."""
        if message.keystrokes != self.prompt.keystrokes:
            return  # the step would overwrite what was typed since
        at = self._outbox.edited
        if at is not None and self.prompt.text != printable(self._outbox.queue[at].message.typed):
            return
        target = (len(self._outbox.queue) if at is None else at) + message.by
        if 0 <= target < len(self._outbox.queue):
            self.prompt.put(self._outbox.edit(target))
            await self.advance()
        else:
            await self.end_edit()
            if message.by < 0:
                self.prompt.show_older()

    async def end_edit(self, *, empty: bool = True) -> None:
        """End the edit, if any: the message stays in the queue as it was.

        Args:
            empty: Empty the input, which has the text of the message.
        """
        if self._outbox.edited is not None:
            self._outbox.end_edit()
            if empty:
                self.prompt.empty()
            await self.advance()

    async def action_queue_drop(self) -> None:
        """Remove the queued message being edited, or the newest one."""
        at = self._outbox.edited
        if at is not None:
            self.prompt.empty()
        if not self._outbox.queue:
            self.toast("no messages are queued", "information")
            return
        dropped = self._outbox.drop(len(self._outbox.queue) - 1 if at is None else at)
        self.toast(f"removed (the input history has it): {shortened(dropped.typed)}", "information")
        await self.advance()

    async def action_queue_clear(self) -> None:
        """Remove all queued messages."""
        await self.end_edit()
        dropped = self._outbox.clear()
        text = f"{plural(len(dropped), 'queued message')} removed; the input history has them"
        self.toast(text if dropped else "no messages are queued", "information")
        self.show_queue()
