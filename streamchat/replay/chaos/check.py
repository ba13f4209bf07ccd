"""Checks that no finished turn was lost: reads the database without streamchat, and compares."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streamchat.replay.chaos.injector import digest
from streamchat.replay.chaos.log import ChaosLog

MAX_FAULTS = 20
_TURNS = (
    "SELECT turns.session, turns.number, asked.text, ifnull(replied.text, '') FROM turns "
    "JOIN messages asked ON asked.turn = turns.id AND asked.role = 'user' "
    "LEFT JOIN messages replied ON replied.turn = turns.id AND replied.role = 'assistant' WHERE turns.state = 'done'"
)


@dataclass(frozen=True)
class Kept:
    """Whether everything that was reported as finished is still there."""

    turns: int
    """Finished turns that were compared."""
    faults: tuple[str, ...]
    reopened: str
    """The result of opening the session in a new process."""

    @property
    def holds(self) -> bool:
        """Whether nothing was lost."""
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        """Return the object for the report."""
        return asdict(self) | {"holds": self.holds}


def check_kept(log: ChaosLog, database: Path) -> Kept:
    """Compare the finished turns with the database, and the cache with the one that a new process restored."""
    faults = [] if not log.turns else _stored_faults(log, database)
    last, reopened = log.last, log.reopened
    if last is None:
        result = "no turn finished"
    elif reopened is None or reopened["session"] != last["session"]:
        result = "not opened"
        faults.append(f"a new process did not open the session {last['session']}")
    elif reopened["tokens"] != last["tokens"]:
        result = "a different token log"
        faults.append(f"a new process has {reopened['tokens']:,} tokens of the session, not {last['tokens']:,}")
    elif reopened["cached"] != last["cached"]:
        result = "different cached tokens"
        faults.append("the cache that a new process restored differs from the cache of the run")
    else:
        result = f"{last['tokens']:,} tokens, and the same cached tokens"
    return Kept(len(log.turns), tuple(faults), result)


def _stored_faults(log: ChaosLog, database: Path) -> list[str]:
    try:
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            [verdict] = connection.execute("PRAGMA integrity_check(1)").fetchone()
            stored = {
                (session, number): (digest(asked), digest(reply))
                for session, number, asked, reply in connection.execute(_TURNS)
            }
    except sqlite3.Error as error:
        return [f"{database} cannot be read: {error}"]
    faults = [] if verdict == "ok" else [f"{database} is damaged: {verdict}"]
    for key, turn in log.turns.items():
        where = f"turn {key[1]} of session {key[0] or '(never saved)'}"
        if key not in stored:
            faults.append(f"{where} is not in the database")
        elif stored[key] != (turn["text"], turn["reply"]):
            faults.append(f"{where} has a different text in the database")
    return faults if len(faults) <= MAX_FAULTS else [*faults[:MAX_FAULTS], f"and {len(faults) - MAX_FAULTS} more"]
