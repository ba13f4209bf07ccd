"""Disks after a power failure: what may remain of recorded changes that were not flushed.

Flushed changes remain. Of the others, each file keeps any of its writes, in any order, each whole or torn into sectors.
Each folder keeps only its earliest changes, up to any moment; a rename happens in both folders or in neither. A name
may therefore be on the disk without the contents, or the contents without the name, and a folder without its own name
is lost with everything in it. File systems that follow POSIX lose no more than this, and most lose less.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tools.disk.journal import ROOT, Change, Data, Mark, Names, Recording, Size, Sync

SECTOR = 512
"""Bytes that a disk writes whole or not at all."""
State = dict[str, bytes | None]
"""Path below the root -> contents; None for a folder."""


@dataclass(frozen=True)
class Policy:
    """Which of the changes that were not flushed remain.

    Args:
        name: Name for messages.
        names: Changes of folders that remain: "all", "none", "first" (up to a random moment), or "any".
        contents: Writes of a file that remain: "all", "none", "size" (only its size, with zeros), "any", or "torn" (any
            sectors of any writes).
    """

    name: str
    names: str
    contents: str


POLICIES = (
    Policy("killed", "all", "all"),
    Policy("all lost", "none", "none"),
    Policy("names without contents", "all", "none"),
    Policy("names and sizes without contents", "all", "size"),
    Policy("contents without names", "none", "all"),
    Policy("torn", "all", "torn"),
    Policy("reordered", "any", "any"),
    Policy("reordered and torn", "any", "torn"),
    Policy("in order of names, contents reordered", "first", "any"),
)


@dataclass
class _File:
    flushed: bytearray = field(default_factory=bytearray)
    pending: list[Data | Size] = field(default_factory=list)


class Disk:
    """The disk at one moment of a recording: the flushed changes, and the others.

    A file that was changed through mapped memory may have any contents.
    """

    def __init__(self, recording: Recording) -> None:
        self._folders, self._mapped = recording.folders, recording.mapped
        self._files: dict[int, _File] = {}
        self._entries: dict[int, dict[str, int]] = {ROOT: {}}
        self._pending: list[Names] = []

    def apply(self, change: Change) -> None:
        """Apply the next change."""
        match change:
            case Data(file=number) | Size(file=number):
                self._files.setdefault(number, _File()).pending.append(change)
            case Names():
                self._pending.append(change)
            case Sync(number=number) if number in self._folders:
                wanted = [i for i, each in enumerate(self._pending) if number in each.folders]
                kept = _closed(self._pending, wanted)
                for i in sorted(kept):
                    _rename(self._entries, self._pending[i])
                self._pending = [each for i, each in enumerate(self._pending) if i not in kept]
            case Sync(number=number):
                file = self._files.setdefault(number, _File())
                _write(file.flushed, file.pending)
                file.pending = []
            case _:
                pass

    def state(self, policy: Policy, rng: random.Random) -> State:
        """Return the files that remain under `policy`."""
        entries = {folder: dict(names) for folder, names in self._entries.items()}
        for i in sorted(self._kept_names(policy.names, rng)):
            _rename(entries, self._pending[i])
        return dict(self._tree(entries, ROOT, "", lambda number: self._contents(number, policy.contents, rng)))

    def _kept_names(self, which: str, rng: random.Random) -> set[int]:
        count = len(self._pending)
        match which:
            case "all":
                return set(range(count))
            case "first":
                return set(range(rng.randint(0, count)))
            case "any":
                return _closed(self._pending, [i for i in range(count) if rng.random() < 0.3])
            case _:
                return set()

    def _contents(self, number: int, which: str, rng: random.Random) -> bytes:
        file = self._files.get(number, _File())
        if number in self._mapped and which != "all":
            return rng.choice((b"", bytes(32768), rng.randbytes(32768)))
        contents = bytearray(file.flushed)
        match which:
            case "all":
                _write(contents, file.pending)
            case "size":
                full = bytearray(contents)
                _write(full, file.pending)
                _write(contents, [Size(number, len(full))])
            case "any":
                _write(contents, [each for each in file.pending if rng.random() < 0.5])
            case "torn":
                _write(contents, [part for each in file.pending for part in _torn(each, rng)])
            case _:
                pass
        return bytes(contents)

    def _tree(
        self, entries: dict[int, dict[str, int]], folder: int, path: str, contents: Callable[[int], bytes]
    ) -> Iterator[tuple[str, bytes | None]]:
        for name, number in sorted(entries.get(folder, {}).items()):
            inner = f"{path}{name}"
            if number in self._folders:
                yield inner, None
                yield from self._tree(entries, number, f"{inner}/", contents)
            else:
                yield inner, contents(number)


def _closed(pending: Sequence[Names], wanted: Sequence[int]) -> set[int]:
    """Add to `wanted` all earlier changes of the same folders, because a folder keeps its earliest changes."""
    kept: set[int] = set()
    folders: set[int] = set()
    marked = set(wanted)
    for i in range(len(pending) - 1, -1, -1):
        if i in marked or pending[i].folders & folders:
            kept.add(i)
            folders |= pending[i].folders
    return kept


def _rename(entries: dict[int, dict[str, int]], change: Names) -> None:
    for folder, name, number in change.entries:
        names = entries.setdefault(folder, {})
        if number is None:
            names.pop(name, None)
        else:
            names[name] = number


def _write(contents: bytearray, changes: Sequence[Data | Size]) -> None:
    for change in changes:
        if isinstance(change, Size):
            del contents[change.size :]
            contents.extend(bytes(change.size - len(contents)))
        else:
            if len(contents) < change.offset:
                contents.extend(bytes(change.offset - len(contents)))
            contents[change.offset : change.offset + len(change.data)] = change.data


def _torn(change: Data | Size, rng: random.Random) -> Iterator[Data | Size]:
    """Yield some of the sectors of a write, at random; other changes are whole or missing."""
    if isinstance(change, Size):
        if rng.random() < 0.5:
            yield change
        return
    at = 0
    while at < len(change.data):
        stop = min(len(change.data), at + SECTOR - (change.offset + at) % SECTOR)
        if rng.random() < 0.5:
            yield Data(change.file, change.offset + at, change.data[at:stop])
        at = stop


@dataclass(frozen=True)
class Left:
    """A disk after a power failure."""

    moment: int
    """Number of changes before the failure."""
    policy: Policy
    state: State


def power_failures(
    recording: Recording, draws: int, seed: int, concerns: Callable[[int], bool] = lambda moment: True
) -> Iterator[Left]:
    """Yield disks after a power failure, in order of time.

    Each pair of a moment and a policy is drawn once before any is drawn again; fewer draws than pairs are chosen at
    random. Equal disks with the same promises (no mark in between) are yielded once, so there are fewer disks than
    `draws`.

    Args:
        recording: What was recorded.
        draws: Number of pairs of a moment and a policy.
        seed: Seed of the draws.
        concerns: Returns whether a moment is of interest.
    """
    rng = random.Random(seed)
    moments = [i for i, change in enumerate(recording.changes, 1) if not isinstance(change, Sync) and concerns(i)]
    pairs = [(moment, policy) for moment in moments for policy in POLICIES]
    if not pairs:
        return
    drawn = pairs * (draws // len(pairs)) + rng.sample(pairs, draws % len(pairs))
    chosen: dict[int, list[Policy]] = {}
    for moment, policy in drawn:
        chosen.setdefault(moment, []).append(policy)
    disk, seen = Disk(recording), set[int]()
    for i, change in enumerate(recording.changes, 1):
        disk.apply(change)
        if isinstance(change, Mark):
            seen.clear()
        for policy in chosen.get(i, ()):
            state = disk.state(policy, rng)
            if (key := hash(tuple(state.items()))) not in seen:
                seen.add(key)
                yield Left(i, policy, state)
