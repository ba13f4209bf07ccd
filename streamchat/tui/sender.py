"""Sends what the user writes, and lets the user edit, remove, hold and resume what is queued."""

from __future__ import annotations

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError
from streamchat.base.formatting import plural
from streamchat.base.sanitize import printable
from streamchat.frontend import mentions
from streamchat.frontend.outbox import Message, Outbox, SendResult
from streamchat.frontend.slash.queue import shortened
from streamchat.tui.bindings import hint
from streamchat.tui.host import ChatView


class Sender:
    """Connects an `Outbox` with the input, the list of queued messages, and the conversation."""

    def __init__(self, outbox: Outbox, view: ChatView) -> None:
        self._outbox, self._view = outbox, view
        self._prompt = view.prompt

    async def send(self, typed: str, text: str) -> bool:
        """Send or queue `text` with the files that it mentions; on failure shows a toast and returns False."""
        try:
            expanded = mentions.expand(text)
        except ConfigError as error:
            self._view.toast(str(error), "error")
            return False
        sent = self._outbox.offer(Message(typed, expanded.text))
        if sent is SendResult.REFUSED:
            self.refuse()
            return False
        if expanded.notice:
            await self._view.conversation.add_notice(expanded.notice, "warning")
        if sent is SendResult.SENT:
            await self._view.show_sent(expanded.text)
        self.refresh()
        return True

    def refuse(self) -> None:
        """Tell the user that the engine has stopped."""
        self._view.toast(f"the engine has stopped; press {hint(self._prompt.app, 'app.quit')} to quit", "error")

    async def engine_idle(self) -> None:
        """Send the next message: the turn, the command or the loading has ended."""
        self._outbox.idle()
        await self.advance()

    async def advance(self) -> None:
        """Send the first queued message if it is due, and show the queue."""
        text = self._outbox.send_next()
        if text is not None:
            await self._view.show_sent(text)
        self.refresh()

    def refresh(self) -> None:
        """Show the queue."""
        self._view.queue_panel.show(self._outbox)
        self._prompt.has_queue = bool(self._outbox.queue)
        self._prompt.edits_queued = self._outbox.edited is not None
        self._view.show_keys()

    async def restore(self, event: ev.TurnFinished) -> None:
        """Return the message of a turn that was rolled back to the input, or hold it if the input is in use."""
        typed = self._outbox.typed(event.text)
        if event.finish_reason != "cancelled":  # a stop has already held what waited then; later messages are not held
            self._outbox.hold()
        if self._prompt.is_blank and self._outbox.edited is None:
            self._prompt.put(typed)
            where = "back in the input"
        else:
            self._outbox.put_back(Message(typed, event.text))
            where = "held in the queue"
        await self._view.conversation.add_notice(f"Your message is {where}.")

    # --- the queue, as the user handles it ----------------------------------------------------------------------

    def hold(self) -> None:
        """Hold all queued messages."""
        self._outbox.hold()
        self.refresh()

    async def enter_blank(self) -> None:
        """Enter in a blank input: send the held messages; during an edit, remove the message."""
        if self._outbox.edited is not None:
            await self.drop()
            return
        self._outbox.resume()
        await self.advance()

    async def step(self, by: int) -> None:
        """Edit the queued message before (-1) or after (1) the edited one; first the newest. Keeps a changed text."""
        at = self._outbox.edited
        if at is not None and self._prompt.text != printable(self._outbox.queue[at].message.typed):
            return
        target = (len(self._outbox.queue) if at is None else at) + by
        if 0 <= target < len(self._outbox.queue):
            self._prompt.put(self._outbox.edit(target))
            await self.advance()
        else:
            await self.end_edit()
            if by < 0:
                self._prompt.show_older()

    async def end_edit(self, *, empty: bool = True) -> None:
        """End the edit, if any: the message stays in the queue as it was.

        Args:
            empty: Empty the input, which has the text of the message.
        """
        if self._outbox.edited is not None:
            self._outbox.end_edit()
            if empty:
                self._prompt.empty()
            await self.advance()

    async def drop(self) -> None:
        """Remove the edited message, or the newest one."""
        at = self._outbox.edited
        if at is not None:
            self._prompt.empty()
        if not self._outbox.queue:
            self._view.toast("no messages are queued", "information")
            return
        dropped = self._outbox.drop(len(self._outbox.queue) - 1 if at is None else at)
        self._view.toast(f"removed (the input history has it): {shortened(dropped.typed)}", "information")
        await self.advance()

    async def clear(self) -> None:
        """Remove all queued messages."""
        await self.end_edit()
        dropped = self._outbox.clear()
        text = f"{plural(len(dropped), 'queued message')} removed; the input history has them"
        self._view.toast(text if dropped else "no messages are queued", "information")
        self.refresh()
