"""What the store holds, as plain data. Ids are arrays of signed 32-bit integers, times seconds since 1970."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Run = tuple[int, int]
"""`[first, stop)` of token log indices."""
TurnState = Literal["running", "done"]


def clean(text: str) -> str:
    """Text that SQLite takes: lone surrogates (from undecodable input) are replaced."""
    return text.encode("utf-8", "replace").decode("utf-8")


def packed(ids: Iterable[int]) -> bytes:
    """Ids as they are stored: little-endian int32."""
    values = array("i", ids)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()


def unpacked(data: bytes) -> array[int]:
    """The ids of `packed`."""
    values = array("i")
    values.frombytes(data)
    if sys.byteorder == "big":
        values.byteswap()
    return values


@dataclass(frozen=True)
class CacheMark:
    """What a cache held at some moment, without the tensors."""

    held: tuple[Run, ...] = ()
    pins: tuple[Run, ...] = ()
    turn_starts: tuple[int, ...] = ()
    compressions: int = 0


@dataclass
class StoredTurn:
    """One turn."""

    number: int
    text: str
    reply: str
    first: int
    content: int
    reply_first: int
    ids: array[int]
    """All its ids that were fed, from log index `first` on."""
    before: CacheMark = field(default_factory=CacheMark)
    """The cache before it."""
    state: TurnState = "done"
    """'running' where the program was killed inside it."""
    started: float = 0.0
    finished: float | None = None
    stats: Mapping[str, Any] | None = None
    finish_reason: str | None = None


@dataclass(frozen=True)
class StoredEviction:
    """Tokens that left the cache."""

    turn: int
    at: float
    cause: str
    runs: tuple[Run, ...]
    length_before: int
    length_after: int


@dataclass(frozen=True)
class Described:
    """What a session's ids and snapshots belong to."""

    dtype: str
    fingerprint: str
    """Of configuration and weights."""
    tokenizer: str
    """Fingerprint of the tokenizer and of how turns are written."""
    system_ids: array[int]


@dataclass(frozen=True)
class SessionInfo:
    """A conversation without its turns."""

    id: str
    title: str
    created: float
    updated: float
    model: str
    """As `--model` takes it."""
    model_name: str
    dtype: str
    fingerprint: str
    tokenizer: str
    settings: Mapping[str, Any]
    held: tuple[Run, ...] = ()
    pins: tuple[Run, ...] = ()
    compressions: int = 0
    opened_by: int | None = None
    """Process that has it open, or that was killed while it had."""
    turns: int = 0

    @property
    def is_imported(self) -> bool:
        """It was imported and never resumed: no model has read it here, and the one it names is the file's choice."""
        return not self.fingerprint


@dataclass(frozen=True)
class StoredSession:
    """A conversation with all its turns."""

    info: SessionInfo
    system_ids: array[int]
    turns: tuple[StoredTurn, ...]
    evictions: tuple[StoredEviction, ...] = ()
    damage: tuple[str, ...] = ()
    """Names of parts that the database has damaged, and that are left out here."""


@dataclass(frozen=True)
class Found:
    """A message that has the words that were looked for."""

    session: str
    title: str
    turn: int
    role: Literal["user", "assistant"]
    at: float
    excerpt: str
    """The place around the first words."""
    text: str
    undone: bool = False
    """Of a turn that was taken back."""
