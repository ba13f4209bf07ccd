"""The sessions whose caches are in memory: at most one per seat; the least recently used idle one is saved."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from streamchat.server.claims import Owner
from streamchat.server.known import KnownSession
from streamchat.server.seat import Seat


class CallCancelledError(Exception):
    """The client is gone, the time is over, or the server stops, before the reply started."""


@dataclass(frozen=True)
class SwitchTime:
    """Time to put a saved session into a seat, in place of another one if all are used. In seconds."""

    elapsed_s: float
    cpu_s: float
    """CPU time of the model's thread."""


class LiveSessions:
    """Gives sessions a seat. Used on the model's thread.

    Args:
        size: Number of seats.
        make_seat: Makes a seat.
        wait: Lets the running task wait for a condition.
        finish_snapshot: Waits until the snapshot of a session is on the disk.
        forget: Called with a session that is neither saved nor live any more.
        observe_switch: Called with the seconds of each switch to a saved session.
    """

    def __init__(
        self,
        size: int,
        make_seat: Callable[[], Seat],
        wait: Callable[[Callable[[], bool]], None],
        finish_snapshot: Callable[[str], None],
        forget: Callable[[KnownSession], None],
        observe_switch: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._size, self.make_seat, self._wait = size, make_seat, wait
        self._finish_snapshot, self._forget, self._observe_switch = finish_snapshot, forget, observe_switch
        self.seats: list[Seat] = []
        self.switch_times: deque[SwitchTime] = deque(maxlen=1000)
        """The latest switches to saved sessions."""

    def seat_of(self, session: KnownSession, call: Owner, *, is_new: bool) -> Seat:
        """Return the seat of a session, which is restored or started there first if it is not live.

        Raises:
            CallCancelledError: The call was cancelled while all seats were busy.
            SessionError: The session cannot be restored.
        """
        if session.is_live:
            seat = self._seat_with(session)
            if not seat.is_lost:
                return seat
            seat.abandon()
        self._wait(lambda: self._has_free_seat() or call.cancelled.is_set())
        if call.cancelled.is_set():
            raise CallCancelledError
        started, cpu = time.perf_counter(), time.thread_time()
        seat = self._free_seat()
        seat.prefilled_again = 0
        if is_new:
            seat.start(session)
            return seat
        self._finish_snapshot(session.id)
        seat.resume(session)
        switch = SwitchTime(time.perf_counter() - started, time.thread_time() - cpu)
        self.switch_times.append(switch)
        self._observe_switch(switch.elapsed_s)
        return seat

    def drop(self, session: KnownSession) -> None:
        """Free the seat of a session that is not kept."""
        if session.is_live:
            self._seat_with(session).release()
        self._forget(session)

    def abandon_lost(self, seat: Seat) -> None:
        """Free a seat whose session must not go on here."""
        if seat.is_lost:
            seat.abandon()

    def close(self) -> None:
        """Save all sessions and free all seats."""
        for seat in self.seats:
            seat.close()
        self.seats = []

    def add_seat(self) -> Seat:
        """Add an empty seat."""
        seat = self.make_seat()
        self.seats.append(seat)
        return seat

    def sample(self) -> None:
        """Publish the figures of all live sessions."""
        for seat in self.seats:
            seat.sample()

    def _seat_with(self, session: KnownSession) -> Seat:
        return next(seat for seat in self.seats if seat.session is session)

    def _has_free_seat(self) -> bool:
        return len(self.seats) < self._size or any(map(_is_free, self.seats))

    def _free_seat(self) -> Seat:
        """Return an empty seat: one without a session, a new one, or that of the least recently used idle session."""
        for seat in self.seats:
            if seat.session is None:
                return seat
        if len(self.seats) < self._size:
            return self.add_seat()
        seat = min(filter(_is_free, self.seats), key=lambda seat: 0 if seat.session is None else seat.session.used)
        session = seat.session
        assert session is not None
        seat.release()
        if not session.is_saved:
            self._forget(session)
        return seat


def _is_free(seat: Seat) -> bool:
    return seat.session is None or not seat.session.is_busy
