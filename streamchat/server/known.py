"""The sessions that the server knows, and the turns in them, for finding the one that a request continues."""

from __future__ import annotations

import itertools
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from streamchat.base.thinking import split
from streamchat.config.settings import Settings
from streamchat.server.calls import Exchange

_KEY = os.urandom(16)  # so that nobody can prepare two texts with the same digest
_HALF = 8
_ID = re.compile(r"(?:resp_)?([a-z0-9]{1,32})_([0-9]{1,9})_([0-9a-z]{1,16})", re.ASCII)
_UNSAVED = re.compile(r"x[0-9a-f]{24}", re.ASCII)
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_clock = itertools.count(1)


def _digest(text: str) -> bytes:
    return blake2b(text.strip().encode("utf-8", "replace"), digest_size=_HALF, key=_KEY).digest()


def message_key(text: str) -> bytes:
    """Return the digest of a message without white space at its ends."""
    return _digest(text)


def reply_key(text: str) -> bytes:
    """Return the digest of a reply without white space at its ends and without its reasoning.

    Clients send the answer alone; it is empty if the reply was cut off in its reasoning.
    """
    return _digest(split(text)[1])


def turn_key(message: str, reply: str) -> bytes:
    """Return the digest of a turn: that of its message, then that of its reply."""
    return message_key(message) + reply_key(reply)


def exchange_key(exchange: Exchange) -> bytes:
    """Return the digest of an exchange; that of the reply alone if the client has dropped the message."""
    if exchange.message is None:
        return reply_key(exchange.reply)
    return turn_key(exchange.message, exchange.reply)


def is_same(turn: bytes, exchange: bytes) -> bool:
    """Return whether a turn and an exchange have the same digest."""
    return turn.endswith(exchange)  # digests have a fixed length


def base36(number: int) -> str:
    """Return a number as digits and lower-case letters."""
    text = ""
    while number or not text:
        number, digit = divmod(number, 36)
        text = _DIGITS[digit] + text
    return text


@dataclass(frozen=True)
class ReplyId:
    """The parts of the id of a reply."""

    session: str
    turn: int
    stamp: str
    """When the turn started: a turn that replaces another one has another id."""

    def __str__(self) -> str:
        return f"{self.session}_{self.turn}_{self.stamp}"

    @classmethod
    def parse(cls, text: str) -> ReplyId | None:
        """Return the parts of `text`; None if it is not an id."""
        found = _ID.fullmatch(text)
        return None if found is None else cls(found[1], int(found[2]), found[3])


def stamp_of(started: float) -> str:
    """Return the stamp of a turn that started at this time."""
    return base36(int(started * 1e6))


@dataclass(eq=False)
class KnownSession:
    """A session that the server has used. The digests of its turns stay in memory, the rest only while it is live."""

    system: str | None
    """The system prompt that the client gave; None for that of the settings."""
    scope: str = ""
    keep: bool = True
    id: str = field(default_factory=lambda: f"x{secrets.token_hex(12)}")
    """The id of the saved session; x and 24 digits while it is not saved."""
    keys: list[bytes] = field(default_factory=list)
    """The digest of each turn; change it with `add_turn`, `set_turns`, and `cut_after`."""
    stamps: dict[int, str] = field(default_factory=dict)
    """Of the newest turns: the stamp of its id."""
    cut: set[int] = field(default_factory=set)
    """Turns whose reply was cut off."""
    completions: set[int] = field(default_factory=set)
    """Turns that came to `/v1/chat/completions`, so that no id of them is in use."""
    settings: Settings | None = None
    """Settings that attached front ends have changed; None for those of the server, with `system`."""
    is_live: bool = False
    """Whether its cache is in memory."""
    is_busy: bool = False
    """Whether a request works on it."""
    is_shared: bool = False
    """Whether front ends look at it, or did lately."""
    used: int = field(default_factory=lambda: next(_clock))
    """Larger than that of every session that was used earlier."""

    def __post_init__(self) -> None:
        self._digests = bytearray(b"".join(self.keys))

    def add_turn(self, key: bytes) -> None:
        """Add the digest of a turn."""
        self.keys.append(key)
        self._digests += key

    def set_turns(self, keys: Iterable[bytes]) -> None:
        """Replace the digests of all turns."""
        self.keys = list(keys)
        self._digests = bytearray(b"".join(self.keys))

    def may_have(self, key: bytes) -> bool:
        """Return whether a turn may have this digest, also that of its reply alone. Takes about a microsecond."""
        return key in self._digests

    @property
    def is_saved(self) -> bool:
        """Whether the store has it, whose ids are shorter."""
        return _UNSAVED.fullmatch(self.id) is None

    def touch(self) -> None:
        """Note that it is used now."""
        self.used = next(_clock)

    def cut_after(self, turns: int) -> None:
        """Remove the turns after the first `turns`."""
        self.set_turns(self.keys[:turns])
        self.stamps = {number: stamp for number, stamp in self.stamps.items() if number <= turns}
        self.cut = {number for number in self.cut if number <= turns}
        self.completions = {number for number in self.completions if number <= turns}

    def copy(self, turns: int) -> KnownSession:
        """Return a new session with the first `turns` turns of this one, which are not addressed by ids."""
        return KnownSession(self.system, self.scope, self.keep, keys=self.keys[:turns], settings=self.settings)

    def may_replace_after(self, turns: int, message: str) -> bool:
        """Return whether the turns after the first `turns` may be replaced, with a reply to `message`.

        Those that were cut off may, and the newest turn if a client asks for another reply to its message.
        """
        later = range(turns + 1, len(self.keys) + 1)
        if all(number in self.cut for number in later):
            return True
        is_newest = len(later) == 1 and later[0] in self.completions
        return is_newest and self.keys[-1].startswith(message_key(message))


@dataclass(frozen=True)
class Match:
    """A session that has the start of a client's history."""

    session: KnownSession
    turns: int
    """The request continues after this turn."""
    exchanges: int
    """Number of exchanges of the history, from its start, that are turns of the session."""
    is_whole: bool
    """Whether the history starts with the first turn; otherwise the client has dropped the start."""


MIN_TAIL = 2
"""Minimum number of exchanges to recognize a session whose start the client has dropped."""
MAX_KNOWN = 1000
"""Number of sessions in memory; older ones are found in the store."""
DEPTH = 64
"""How many turns back a session can be continued: those that can be undone."""


class KnownSessions:
    """All sessions that the server knows, by id."""

    def __init__(self) -> None:
        self._sessions: dict[str, KnownSession] = {}

    def __iter__(self) -> Iterator[KnownSession]:
        return iter(list(self._sessions.values()))

    def __contains__(self, session: str) -> bool:
        return session in self._sessions

    def get(self, session: str) -> KnownSession | None:
        """Return the session with this id."""
        return self._sessions.get(session)

    def add(self, session: KnownSession) -> None:
        """Add a session; the least recently added one that the store has is dropped if there are too many."""
        self._sessions[session.id] = session
        if len(self._sessions) > MAX_KNOWN:
            for each in self:
                if each.is_saved and not (each.is_live or each.is_busy or each.is_shared):
                    self.remove(each)
                    break

    def remove(self, session: KnownSession) -> None:
        """Remove a session."""
        self._sessions.pop(session.id, None)

    def rename(self, session: KnownSession, new: str) -> None:
        """Change the id of a session, which is saved from now on."""
        self.remove(session)
        session.id = new
        self.add(session)

    def match(self, history: Sequence[Exchange], system: str | None, scope: str) -> Match | None:
        """Return the session that `history` continues; None without one.

        The most exchanges win, then a history with its start, then the most recently used session. A history without
        its start must belong to one conversation, or to branches of it: two conversations may end alike.
        """
        if not history:
            return None
        keys = [exchange_key(each) for each in history]
        sessions = [each for each in self if each.system == system and each.scope == scope]
        return best_match(keys, sessions)


def best_match(keys: Sequence[bytes], sessions: Iterable[KnownSession]) -> Match | None:
    """Return the best match of the exchanges with these digests."""
    found: list[Match] = []
    for session in sessions:
        found += _matches(keys, session)
    for count in sorted({match.exchanges for match in found}, reverse=True):
        same = [match for match in found if match.exchanges == count]
        whole = [match for match in same if match.is_whole]
        if whole or len({tuple(match.session.keys[: match.turns]) for match in same}) == 1:
            return max(whole or same, key=lambda match: (match.turns == len(match.session.keys), match.session.used))
    return None


def _matches(keys: Sequence[bytes], session: KnownSession) -> Iterator[Match]:
    turns = session.keys
    oldest = max(1, len(turns) - DEPTH)
    shared = 0
    if len(keys[0]) > _HALF:
        while shared < min(len(keys), len(turns)) and turns[shared] == keys[shared]:
            shared += 1
    if shared >= oldest:
        yield Match(session, shared, shared, True)
    if shared == len(keys):
        return
    for count in (len(keys), len(keys) - 1):  # the newest reply may have been cut, or changed by the user
        if count < MIN_TAIL:
            break
        if not session.may_have(keys[count - 1]):
            continue
        # a history that has its first message is whole, or another conversation
        lowest = count if len(keys[0]) == _HALF else count + 1
        for end in range(len(turns), max(oldest, lowest) - 1, -1):
            if all(map(is_same, turns[end - count : end], keys[:count])):
                yield Match(session, end, count, False)
                break
        else:
            continue
        break
