"""Records of the store, as plain data. Ids are arrays of signed 32-bit integers, times are seconds since 1970."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from streamchat.base.errors import ConfigError
from streamchat.base.sanitize import one_line
from streamchat.store.clock import latest_time

MAX_TITLE = 200
SCOPE = "api_scope"
"""Key of the scope of a session of a server among its stored settings."""
Run = tuple[int, int]
"""`[first, stop)` of token log indices."""
TurnState = Literal["running", "done"]


def clean(text: str) -> str:
    """Replace lone surrogates (from undecodable input), which SQLite rejects."""
    return text.encode("utf-8", "replace").decode("utf-8")


def checked_title(text: str) -> str:
    """Return the title that a user gave to a session, on one line.

    Raises:
        ConfigError: It shows nothing, or is too long.
    """
    title = clean(" ".join(text.split()))
    if not one_line(title):
        raise ConfigError("a title needs at least one visible character")
    if len(title) > MAX_TITLE:
        raise ConfigError(f"a title of {len(title):,} characters is too long; use at most {MAX_TITLE}")
    return title


def pack_ids(ids: Iterable[int]) -> bytes:
    """Encode ids for storage: little-endian int32."""
    values = array("i", ids)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()


def unpack_ids(data: bytes) -> array[int]:
    """Decode the bytes of `pack_ids`."""
    values = array("i")
    values.frombytes(data)
    if sys.byteorder == "big":
        values.byteswap()
    return values


@dataclass(frozen=True)
class CacheMark:
    """Bookkeeping snapshot of a cache, without tensors. The field names are JSON keys in the database."""

    held: tuple[Run, ...] = ()
    pins: tuple[Run, ...] = ()
    turn_starts: tuple[int, ...] = ()
    compressions: int = 0
    base: int = field(default=0, compare=False)
    """Absolute position of the first slot."""
    originals: int = field(default=0, compare=False)
    """Number of slots at the front that had been moved before."""
    generation: int = field(default=0, compare=False)
    """Identifies the contents of the cache, with `epoch`; 0 if they are not known. See `streamchat.cache.form`."""
    epoch: int = field(default=0, compare=False)


@dataclass
class StoredTurn:
    """One turn. `start`, `message_start` and `reply_start` are token log indices, see `TurnRecord`."""

    number: int
    text: str
    reply: str
    start: int
    message_start: int
    reply_start: int
    ids: array[int]
    """All ids of the turn that were fed, from log index `start` on."""
    before: CacheMark = field(default_factory=CacheMark)
    """The cache before the turn."""
    state: TurnState = "done"
    """'running' if the program was killed during the turn."""
    started: float = 0.0
    finished: float | None = None
    stats: Mapping[str, Any] | None = None
    finish_reason: str | None = None


@dataclass(frozen=True)
class NewSession:
    """A session to create with all its turns."""

    title: str
    identity: ModelIdentity
    settings: Mapping[str, Any]
    turns: tuple[StoredTurn, ...] = ()


@dataclass(frozen=True)
class StoredEviction:
    """One eviction."""

    turn: int
    at: float
    cause: str
    runs: tuple[Run, ...]
    length_before: int
    length_after: int


@dataclass(frozen=True)
class ModelIdentity:
    """The model that a session's ids and snapshots belong to."""

    model: str
    """In the form that `--model` accepts."""
    model_name: str
    dtype: str = ""
    """Dtype, weights and cache: 'float32, int4 weights, bfloat16 cache'."""
    fingerprint: str = ""
    """Fingerprint of configuration and weights; '' if the session was imported."""
    tokenizer: str = ""
    """Fingerprint of the tokenizer and the chat format; '' if the saved ids must not be used."""
    full_dtype: str = ""
    """`dtype` of the same model with keys and values in the model's dtype. Not stored."""


@dataclass(frozen=True)
class SessionInfo:
    """A saved session without its turns."""

    id: str
    title: str
    created: float
    updated: float
    model: str
    """In the form that `--model` accepts."""
    model_name: str
    dtype: str
    fingerprint: str
    tokenizer: str
    settings: Mapping[str, Any]
    held: tuple[Run, ...] = ()
    pins: tuple[Run, ...] = ()
    compressions: int = 0
    opened_by: int | None = None
    """Id of the process that has it open, or that was killed while it did."""
    turns: int = 0
    parent: str | None = None
    """Id of the session that it was forked from."""
    parent_turn: int | None = None
    """The last turn of that session that it shares."""

    @property
    def is_ahead(self) -> bool:
        """Whether it was last written while the clock was ahead, so that its age is unknown."""
        return self.updated > latest_time()

    @property
    def is_imported(self) -> bool:
        """Whether it was imported and never resumed. Its model name then comes from the imported file only."""
        return not self.fingerprint


@dataclass(frozen=True)
class StoredSession:
    """A saved session with all its turns."""

    info: SessionInfo
    system_ids: array[int]
    turns: tuple[StoredTurn, ...]
    evictions: tuple[StoredEviction, ...] = ()
    damage: tuple[str, ...] = ()
    """Names of parts that are damaged in the database and left out here."""


@dataclass(frozen=True)
class SearchHit:
    """A message that matches a search."""

    session: str
    title: str
    turn: int
    role: Literal["user", "assistant"]
    at: float
    excerpt: str
    """The text around the first match."""
    text: str
    undone: bool = False
    """Whether its turn was undone."""
