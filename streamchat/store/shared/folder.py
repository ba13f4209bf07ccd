"""A folder that several machines share: who owns each session, its log, and its snapshots.

Each session has a folder of its own. The owner with the highest generation owns the session. A new owner first creates
the file of the next generation, which only one program can do, and then reads the log. An owner writes only to the log
of its own generation, and after each write checks that no higher generation exists. What it confirms was therefore
written before the next owner read the log, and what a former owner writes later is never read.

The files of former owners are deleted, so that a program that was stopped for a long time can create one of them again.
A claim therefore fails if a higher generation exists, and an owner reads whose name is in the file of its generation.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from streamchat.base.atomic_files import advice_or, write_new, write_text
from streamchat.base.errors import MissingSessionError, SessionError, StoreError, reason_of
from streamchat.base.paths import fsync, private_dir, private_opener
from streamchat.base.thinking import split
from streamchat.store.records import StoredSession
from streamchat.store.shared.log import read_log

_OWNER, _LOG, _CACHE = "owner-", "log-", "cache-"
_NAME = re.compile(r"[a-z0-9]{1,32}", re.ASCII)
_NUMBER = re.compile(r"(owner-|log-)([0-9]{6}|[1-9][0-9]{6,8})", re.ASCII)
ATTEMPTS = 5
"""Maximum attempts to claim or read a session while other replicas claim it."""
NEWEST = 4
"""Exchanges of a session, the newest ones, by which it can be found."""


class SessionMovedError(StoreError):
    """Another replica owns the session now."""

    def __init__(self, session: str) -> None:
        super().__init__(f"another replica has taken over the session {session}; send the request again")


@dataclass(frozen=True)
class Claim:
    """Who owns a session."""

    generation: int
    """From 1; larger than that of every former owner."""
    owner: str
    """Name of the replica."""


@dataclass(frozen=True)
class Version:
    """A state of a session's log."""

    generation: int
    size: int


@dataclass
class Ownership:
    """A session that this replica owns."""

    generation: int
    has_log: bool = False
    """Whether the log of this generation has the whole session."""


class SharedFolder:
    """A shared folder, as one replica uses it. Thread-safe.

    Args:
        root: The folder.
        owner: Name of this replica, which no other one has; '' for a reader.
    """

    def __init__(self, root: Path, owner: str = "") -> None:
        self.root, self._owner = root, owner
        self._owned: dict[str, Ownership] = {}
        self._lock = threading.RLock()

    # --- owners -----------------------------------------------------------------------------------------------

    def claim_of(self, session: str) -> Claim | None:
        """Return who owns a session; None if there is no session of this name."""
        folder = self._folder(session)
        for _ in range(ATTEMPTS):  # the file of a former owner may be deleted meanwhile
            generations = _numbers(folder, _OWNER)
            if not generations:
                return None
            with suppress(FileNotFoundError), self._errors():
                return Claim(generations[-1], _text(folder / _name(_OWNER, generations[-1])))
        return None

    def create(self, session: str) -> bool:
        """Own a new session; return False if its name is taken, also by a session whose first owner is gone."""
        return self._claim(session, 1)

    def take_over(self, session: str) -> tuple[StoredSession, Version] | None:
        """Own a session; return it as `read` does, or None if this replica owned it already.

        Raises:
            MissingSessionError: There is no such session, or it has no finished turn.
            SessionError: Other replicas claim it all the time.
            StoreError: The folder cannot be used, or the log cannot be read. This replica does not own the session.
        """
        for _ in range(ATTEMPTS):
            if self.owns(session):
                return None
            claim = self.claim_of(session)
            if claim is None:
                raise MissingSessionError(f"no session has the id {session!r}")
            if self._claim(session, claim.generation + 1):
                return self._read_owned(session)
        raise SessionError(f"other replicas keep claiming the session {session!r}; try again later")

    def _read_owned(self, session: str) -> tuple[StoredSession, Version]:
        try:
            found = self.read(session)
            if found is None:
                raise MissingSessionError(f"the session {session!r} has no finished turn")
            return found
        except BaseException:  # the next request must not continue what this replica had of it before
            self.disown(session)
            raise

    def owns(self, session: str) -> bool:
        """Return whether this replica owns a session now.

        Raises:
            StoreError: The folder cannot be read.
        """
        with self._lock:
            owned = self._owned.get(session)
            if owned is None:
                return False
            if self._is_newest(session, owned.generation):
                return True
            self._owned.pop(session, None)
            return False

    def disown(self, session: str) -> None:
        """Write no more to a session. The next request claims it again."""
        with self._lock:
            self._owned.pop(session, None)

    def _claim(self, session: str, generation: int) -> bool:
        folder = self._folder(session)
        with self._lock, self._errors():
            private_dir(folder)
            try:
                write_new(folder / _name(_OWNER, generation), self._owner, durable=True)
            except FileExistsError:
                return False
            if _numbers(folder, _OWNER)[-1:] != [generation]:  # later owners have deleted the file of this generation
                (folder / _name(_OWNER, generation)).unlink(missing_ok=True)
                return False
            self._owned[session] = Ownership(generation)
            return True

    def _is_newest(self, session: str, generation: int) -> bool:
        # in this order: files of former owners are deleted, the oldest first
        folder = self._folder(session)
        with self._errors():
            if (folder / _name(_OWNER, generation + 1)).exists():
                return False
            with suppress(FileNotFoundError):
                return _text(folder / _name(_OWNER, generation)) == self._owner
        return False

    # --- the log ----------------------------------------------------------------------------------------------

    def version(self, session: str) -> Version | None:
        """Return the state of a session's log, to see whether it has changed; None without one."""
        folder = self._folder(session)
        for generation in reversed(_numbers(folder, _LOG)):
            with suppress(FileNotFoundError), self._errors():
                return Version(generation, (folder / _name(_LOG, generation)).stat().st_size)
        return None

    def read(self, session: str) -> tuple[StoredSession, Version] | None:
        """Return a session, and the state of the log that it was read from; None if it has no finished turn.

        Raises:
            StoreError: The folder cannot be read, or the log is damaged or of another version.
        """
        folder = self._folder(session)
        for _ in range(ATTEMPTS):
            is_complete = True
            for generation in reversed(_numbers(folder, _LOG)):
                try:
                    with self._errors():
                        data = (folder / _name(_LOG, generation)).read_bytes()
                except FileNotFoundError:  # replaced by that of a newer owner
                    is_complete = False
                    break
                if (found := read_log(data, str(folder / _name(_LOG, generation)))) is not None:
                    return found, Version(generation, len(data))
            if is_complete:
                return None
        return None

    def ownership(self, session: str) -> Ownership:
        """Return how this replica owns a session.

        Raises:
            SessionMovedError: It does not.
        """
        with self._lock:
            owned = self._owned.get(session)
            if owned is None:
                raise SessionMovedError(session)
            return owned

    def append(self, session: str, line: bytes) -> Version:
        """Write a line to the log; when this returns, it is on the disk, and every later owner will read it.

        Raises:
            SessionMovedError: Another replica has claimed the session. Do not confirm what the line says.
            StoreError: It cannot be written. This replica no longer owns the session.
        """
        with self._lock:
            owned = self.ownership(session)
            folder = self._folder(session)
            path = folder / _name(_LOG, owned.generation)
            try:
                with self._errors():
                    with open(path, "ab", opener=private_opener) as file:
                        file.write(line)
                        file.flush()
                        os.fsync(file.fileno())
                        size = file.tell()
                    if not owned.has_log:
                        fsync(folder)
                if not self._is_newest(session, owned.generation):
                    raise SessionMovedError(session)
            except FileNotFoundError:  # the session was deleted
                self.disown(session)
                raise SessionMovedError(session) from None
            except StoreError:
                self.disown(session)
                raise
            if not owned.has_log:
                owned.has_log = True
                _delete_before(folder, owned.generation)
            return Version(owned.generation, size)

    # --- snapshots --------------------------------------------------------------------------------------------

    def new_snapshot(self, session: str, turns: int) -> Path:
        """Return the path of a new snapshot of a session after a number of turns."""
        with self._lock:
            owned = self._owned.get(session)
        generation = 0 if owned is None else owned.generation  # 0: those of owners are used first
        return self._folder(session) / f"{_CACHE}{turns:06}-{generation:06}.safetensors"

    def snapshot(self, session: str, turns: int) -> Path:
        """Return the path of the newest snapshot after a number of turns, whether there is one or not."""
        folder = self._folder(session)
        found = sorted(folder.glob(f"{_CACHE}{turns:06}-*.safetensors"))
        return found[-1] if found else folder / f"{_CACHE}{turns:06}.safetensors"

    def drop_snapshots(self, session: str, turns: int) -> None:
        """Delete the snapshots of a session that are not of this number of turns."""
        for path in self._folder(session).glob(f"{_CACHE}*.safetensors"):
            if not path.name.startswith(f"{_CACHE}{turns:06}-"):
                with suppress(OSError):
                    path.unlink()

    # --- finding sessions by their newest exchanges -----------------------------------------------------------

    def session_after(self, key: str) -> str | None:
        """Return a session with this key (see `exchange_name`) among its newest exchanges; None without one."""
        try:
            return self._tail(key).read_text(encoding="utf-8")
        except (OSError, ValueError):
            return None

    def add_exchange(self, session: str, key: str) -> None:
        """Let `session_after` find a session; the first one of several with the same exchange stays until deleted."""
        path = self._tail(key)
        with self._errors():
            private_dir(path.parent)
            try:
                write_new(path, session, durable=False)
            except FileExistsError:
                first = self.session_after(key)
                if first is None or self.claim_of(first) is None:
                    write_text(path, session, durable=False)

    def drop_exchange(self, session: str, key: str) -> None:
        """Undo `add_exchange`."""
        if self.session_after(key) == session:
            with suppress(OSError):
                self._tail(key).unlink()

    def identity(self) -> str:
        """Return a text that identifies this folder, whatever its path on other machines; create the folder.

        Raises:
            StoreError: It cannot be used.
        """
        path = self.root / "id"
        try:
            private_dir(self.root)
            with suppress(FileExistsError):
                write_new(path, secrets.token_hex(16), durable=True)
            return path.read_text(encoding="utf-8")
        except OSError as error:
            raise self._error(error) from error

    def _tail(self, key: str) -> Path:
        return self.root / "newest" / key[:3] / key

    def _folder(self, session: str) -> Path:
        if not _NAME.fullmatch(session):
            session = "-"  # no session
        return self.root / "sessions" / session[-2:] / session

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, FileExistsError):
            raise
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> StoreError:
        advice = advice_or(error.errno, "check the folder that is given with --shared")
        return StoreError(f"{self.root} cannot be used ({reason_of(error)}); {advice}")


def exchange_name(scope: str, system: str, message: str, reply: str) -> str:
    """Return the key of an exchange in a session with this scope and system prompt.

    White space at the ends of texts, and reasoning, do not matter.
    """
    digest = blake2b(digest_size=20)
    for text in (scope, system, message.strip(), split(reply)[1].strip()):
        data = text.encode("utf-8", "replace")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _name(kind: str, generation: int) -> str:
    return f"{kind}{generation:06}"


def _numbers(folder: Path, kind: str) -> list[int]:
    """Return the generations of the files of a kind, the lowest first."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(f"{folder} cannot be read ({reason_of(error)}); check the shared folder") from error
    found = (_NUMBER.fullmatch(name) for name in names)
    return sorted(int(each[2]) for each in found if each is not None and each[1] == kind)


def _delete_before(folder: Path, generation: int) -> None:
    with suppress(OSError, StoreError):  # after one that stays, the next ones stay, too: see `_is_newest`
        for kind in (_LOG, _OWNER):
            for number in _numbers(folder, kind):
                if number < generation:
                    (folder / _name(kind, number)).unlink(missing_ok=True)
