"""Carries out the plan in the measured process: disturbs it at seeded moments, or asks its supervisor to do so."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Sequence

from streamchat.base import events as ev
from streamchat.replay.chaos.kind import Inside, Kind
from streamchat.replay.chaos.link import Link
from streamchat.replay.chaos.plan import Moment, moments

AFTER_TURN = 10**9
"""The piece at the end of a turn, however short its reply is."""


class Injector:
    """Observes the events of a run, on the engine's thread. Any thread may close it.

    Args:
        seed: Seed of the plan; None disturbs nothing.
        kinds: The kinds that this machine can have.
        link: Reports what happens.
        session: Id of the session that is resumed; '' for none.
        turns: Turns of the run that an earlier process completed.
    """

    def __init__(self, seed: int | None, kinds: Sequence[Kind], link: Link, session: str, turns: int) -> None:
        self._seed, self._kinds, self._link, self._session = seed, kinds, link, session
        self._turn, self._pieces = turns, 0
        self._due: list[Moment] = []
        self._ends: list[tuple[int, Inside]] = []
        """Turn after which a kind ends."""
        self._turn_began = self._quiet_from = time.monotonic()
        self._cached = {"tokens": 0, "cached": ""}
        self._lock = threading.Lock()

    def is_disturbed(self) -> bool:
        """Return whether a disturbance may have slowed down the current turn."""
        return self._quiet_from > self._turn_began

    def observe(self, event: ev.Event) -> None:
        """Apply the disturbances that are due; report finished turns and notices."""
        with self._lock:
            self._observe(event)

    def _observe(self, event: ev.Event) -> None:
        match event:
            case ev.TurnStarted():
                self._turn, self._pieces, self._turn_began = self._turn + 1, 0, time.monotonic()
                if self._seed is not None:
                    self._due += moments(self._seed, self._turn, self._kinds)
                self._apply(0)
            case ev.TextDelta():
                self._pieces += 1
                self._apply(self._pieces)
            case ev.CacheAudited():
                self._cached = {"tokens": event.log_tokens, "cached": digest(json.dumps([event.ledger, event.ids]))}
                if event.after == "resume":
                    self._link.send("reopened", {"session": self._session, **self._cached})
            case ev.SessionOpened(session=session):
                self._session = session
                self._link.send("session", session)
            case ev.ConversationCleared():
                self._session = ""
            case ev.TurnFinished():
                if not event.rolled_back:
                    self._report(event)
                self._apply(AFTER_TURN)
                self._end_due()
            case ev.TurnUndone(turn=turn):
                self._link.send("undone", {"session": self._session, "turn": turn})
            case ev.Notice(text=text, level=level) if level != "info" or "sav" in text:
                self._link.send("notice", text)
            case _:
                pass

    def _report(self, event: ev.TurnFinished) -> None:
        """Report a turn that a user has seen to its end: from now on, it must not be lost."""
        turn = {
            "session": self._session,
            "turn": event.stats.turn,
            "text": digest(event.text),
            "reply": digest(event.reply),
            "index": self._turn - 1,
            "disturbed": self.is_disturbed(),
        }
        self._link.send("turn", turn | self._cached)

    def _apply(self, piece: int) -> None:
        while self._due and (self._due[0].turn < self._turn or self._due[0].piece <= piece):
            moment = self._due.pop(0)
            kind, values = moment.kind, moment.values
            self._quiet_from = max(self._quiet_from, time.monotonic() + kind.slow_for_s(values))
            if isinstance(kind, Inside):
                kind.apply(values)
                if turns := kind.turns(values):
                    self._ends.append((self._turn + turns, kind))
            order = {"turn": self._turn, "piece": min(piece, self._pieces), "kind": kind.name}
            self._link.send("disturbance", order | {"what": kind.describe(values), "values": values})

    def _end_due(self) -> None:
        for each in [each for each in self._ends if each[0] <= self._turn]:
            self._ends.remove(each)
            if each[1] not in [kind for _, kind in self._ends]:
                each[1].end()

    def close(self) -> None:
        """End all disturbances of this process; none follows."""
        with self._lock:
            self._seed, self._due, self._ends = None, [], []
            for kind in self._kinds:
                if isinstance(kind, Inside):
                    kind.end()


def digest(text: str) -> str:
    """Return a checksum of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
