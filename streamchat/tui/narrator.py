"""Shows engine events in the conversation."""

from __future__ import annotations

from collections.abc import Callable

from streamchat.base import events as ev
from streamchat.base.sanitize import one_line
from streamchat.frontend.messages import recalled_sentence
from streamchat.frontend.presenter import present
from streamchat.telemetry.log_file import log_path
from streamchat.tui.widgets.conversation import Conversation
from streamchat.tui.widgets.lines import FailurePanel, Welcome
from streamchat.tui.widgets.loading import LoadingPanel
from streamchat.tui.widgets.turn import Turn, from_saved_turn

Toast = Callable[[str, str], None]
"""(sentence, 'information' | 'warning' | 'error')"""


class Narrator:
    """Applies events in order to one `Conversation`.

    Args:
        toast: Shows important messages.
    """

    def __init__(self, conversation: Conversation, toast: Toast) -> None:
        self._conversation = conversation
        self._toast = toast
        self.current: Turn | None = None
        """The turn in progress."""
        self._loading: LoadingPanel | None = None
        self._resumed = False
        """A resumed session shows its turns instead of the welcome."""

    async def send(self, text: str) -> None:
        """Show the user's message, before the engine accepts it."""
        self.current = await self._conversation.add_turn(text)

    async def show(self, event: ev.Event) -> None:
        """Show `event` in the conversation; some events show nothing."""
        match event:
            case ev.ModelLoading():
                await self._load(event)
            case ev.ModelReady():
                await self._ready(event)
            case ev.TurnStarted():
                if self.current is not None and self.current.text != event.text:
                    await self._give_way(self.current)
                if self.current is None:
                    await self.send(event.text)
                assert self.current is not None
                self._conversation.number_turn(self.current, event.turn)
            case ev.PrefillProgress():
                if self.current is not None:
                    self.current.show_prefill(event)
            case ev.TokensEvicted():
                await self._conversation.add_eviction(event, self.current)
            case ev.TurnsRecalled() if self.current is not None:
                await self.current.add_recall(recalled_sentence(event))
                return  # shown above the reply, not below it
            case ev.TextDelta(text=text):
                if self.current is not None:
                    await self.current.add(text)
            case ev.TurnFinished():
                await self._finish(event)
            case ev.Notice(level="error"):
                await self._loaded()  # /model failed
            case ev.ConversationCleared():
                self.current, self._resumed = None, False
                await self._conversation.start_over(event.system_prompt)
            case ev.TurnUndone():
                await self._conversation.undo_turn(event.turn)
            case ev.ConversationResumed():
                await self._loaded()
                self.current, self._resumed = None, True
                self._conversation.model = one_line(event.info.name)
                await self._conversation.resume(map(from_saved_turn, event.turns), event.system_prompt)
            case ev.EngineFailed():
                await self._fail(event)
            case _:
                pass
        line = present(event)
        if line is not None and line.kind in ("info", "warning", "error"):
            await self._conversation.add_notice(line.text, line.kind)
            if line.kind != "info":
                self._toast(line.text, line.kind)

    async def _give_way(self, turn: Turn) -> None:
        """Remove a message that waits on the server: a turn of another front end has started first."""
        self.current = None
        await self._conversation.remove_turn(turn)

    async def _load(self, event: ev.ModelLoading) -> None:
        if self._loading is None:
            self._loading = LoadingPanel()
            await self._conversation.add(self._loading)
        self._loading.show(event)

    async def _loaded(self) -> None:
        if self._loading is not None:
            await self._loading.remove()
            self._loading = None

    async def _ready(self, event: ev.ModelReady) -> None:
        await self._loaded()
        self._conversation.model = one_line(event.info.name)
        if not self._resumed:
            await self._conversation.add(Welcome(event))

    async def _finish(self, event: ev.TurnFinished) -> None:
        turn, self.current = self.current, None
        if event.rolled_back:
            if turn is not None:
                await self._conversation.remove_turn(turn)
        elif turn is not None:
            await turn.finish(event)
            await self._conversation.finish_turn(turn)

    async def _fail(self, event: ev.EngineFailed) -> None:
        await self._loaded()
        turn, self.current = self.current, None
        if turn is not None:
            turn.set_status("the engine failed")
        await self._conversation.add(FailurePanel(event, str(log_path())))
        self._conversation.follow()
