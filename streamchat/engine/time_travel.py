"""Rewinds a conversation to an earlier turn, or continues after it in a fork. Runs on the engine's thread."""

from __future__ import annotations

import time
from collections.abc import Callable

from streamchat.base import events as ev
from streamchat.base.errors import ConfigError, StoreError
from streamchat.base.formatting import plural
from streamchat.engine.hosting import ConversationHost
from streamchat.sessions.archive import Archive

MARKS = 64
"""Number of turns before the target of a rewind that can still be undone afterwards."""


class TimeTravel:
    """Carries out `Rewind` and `Fork`.

    Args:
        host: Has the active conversation.
        archive: Saves it.
        emit: Records and publishes an event.
        open_session: Continues with a saved session.
    """

    def __init__(
        self,
        host: ConversationHost,
        archive: Archive,
        emit: Callable[[ev.Event], None],
        open_session: Callable[[str], None],
    ) -> None:
        self._host, self._archive, self._emit, self._open_session = host, archive, emit, open_session

    def rewind(self, number: int, *, drop: bool = False) -> None:
        """Undo all turns after turn `number`; a fork keeps them.

        Args:
            number: Turn number.
            drop: Rewind even if the conversation is not saved, which loses the turns.

        Raises:
            ConfigError: There is no such turn, or nothing would keep the later ones.
        """
        started = time.perf_counter()
        conversation = self._host.active.conversation
        count = self._count(number)
        if not number:
            raise ConfigError("0 is not a turn of this conversation; /clear starts over")
        if number == count:
            raise ConfigError(f"turn {number} is the newest one, so there is nothing to rewind")
        kept_as = ""
        if self._archive.session is not None:
            kept_as = self._fork(number, count)
        elif not drop:
            later = f"turn {count}" if number + 1 == count else f"turns {number + 1} to {count}"
            raise ConfigError(
                f"this conversation is not saved, so {later} would be lost; `/rewind {number} yes` rewinds anyway"
            )
        undone = conversation.log.turns[number:]
        result = conversation.rewind(number, self._archive.marks(number + 1 - MARKS, number + 1))
        seconds = time.perf_counter() - started
        self._host.pin_next = False
        self._archive.record_undo(number + 1)
        state = conversation.state()
        for turn in reversed(undone):
            self._emit(ev.TurnUndone(turn.number, turn.text, turn.reply, state, replaced=True))
        self._emit(
            ev.ConversationRewound(
                number, len(undone), kept_as, result.is_exact, result.restored, result.read_again, seconds, state
            )
        )
        self._archive.snapshot(self._host.active)

    def fork(self, number: int = 0) -> None:
        """Continue in a fork with the turns up to turn `number`, 0 for all. The current session does not change.

        Raises:
            ConfigError: There is no such turn, or the conversation is not saved.
        """
        count = self._count(number)
        self._open_session(self._fork(number or count, number or count))

    def _fork(self, at: int, turns: int) -> str:
        try:
            return self._archive.fork(self._host.active, at, turns)
        except StoreError as error:
            raise ConfigError(str(error)) from error

    def _count(self, number: int) -> int:
        """Return the number of turns.

        Raises:
            ConfigError: There is no turn `number`; 0 stands for the newest one.
        """
        count = len(self._host.active.conversation.log.turns)
        if not count:
            raise ConfigError("the conversation has no turn yet")
        if not 0 <= number <= count:
            raise ConfigError(f"{number} is not a turn of this conversation; it has {plural(count, 'turn')}")
        return count
