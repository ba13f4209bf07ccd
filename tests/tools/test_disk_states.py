"""What a simulated power failure may leave of a few recorded changes; see `tools.disk.states`."""

from __future__ import annotations

import random

import pytest

from tools.disk.journal import ROOT, Change, Data, Names, Recording, Size, Sync
from tools.disk.states import POLICIES, SECTOR, Disk, State, power_failures

FILE, OTHER, FOLDER = 1, 2, 3
OLD, NEW = b"old" * 300, b"new" * 300


def created(name: str, number: int, folder: int = ROOT) -> Names:
    return Names(((folder, name, number),))


def left_after(changes: list[Change], seeds: int = 40) -> list[State]:
    """All that any policy leaves at the end."""
    recording = Recording(changes, frozenset({ROOT, FOLDER}), frozenset())
    disk = Disk(recording)
    for change in changes:
        disk.apply(change)
    return [disk.state(policy, random.Random(seed)) for policy in POLICIES for seed in range(seeds)]


REPLACED: list[Change] = [created("file", FILE), Data(FILE, 0, OLD), Sync(FILE), Sync(ROOT)]
RENAME = Names(((ROOT, "part", None), (ROOT, "file", OTHER)))


@pytest.mark.parametrize("flushed", [True, False])
def test_a_rename_without_a_flush_may_leave_an_empty_file(flushed: bool) -> None:
    write: list[Change] = [created("part", OTHER), Data(OTHER, 0, NEW), *([Sync(OTHER)] if flushed else []), RENAME]
    contents = {state["file"] for state in left_after([*REPLACED, *write])}
    assert contents >= {OLD, NEW}
    assert (b"" in contents) is not flushed
    assert contents <= {OLD, NEW} or not flushed


def test_a_name_is_lost_until_its_folder_is_flushed() -> None:
    write: list[Change] = [Names(((ROOT, "folder", FOLDER),)), created("file", FILE, FOLDER), Data(FILE, 0, NEW)]
    write += [Sync(FILE), Sync(FOLDER)]
    assert {} in left_after(write)  # the folder's own name is not flushed
    assert all(state["folder/file"] == NEW for state in left_after([*write, Sync(ROOT)]))


def test_a_rename_between_folders_is_in_both_or_in_neither() -> None:
    changes: list[Change] = [Names(((ROOT, "folder", FOLDER),)), created("file", FILE), Sync(ROOT), Sync(FOLDER)]
    changes.append(Names(((ROOT, "file", None), (FOLDER, "file", FILE))))
    places = {tuple(path for path, contents in state.items() if contents is not None) for state in left_after(changes)}
    assert places == {("file",), ("folder/file",)}
    assert all("folder/file" in state for state in left_after([*changes, Sync(FOLDER)]))


def test_a_torn_write_keeps_sectors_whole() -> None:
    changes: list[Change] = [created("file", FILE), Data(FILE, 0, b"a" * 2000), Sync(FILE), Sync(ROOT)]
    changes.append(Data(FILE, 100, b"b" * 1500))
    mixed = set()
    for state in left_after(changes):
        contents = state["file"]
        assert contents is not None
        sectors = [contents[max(at, 100) : min(at + SECTOR, 1600)] for at in range(0, 1600, SECTOR)]
        assert all(len(set(sector)) == 1 for sector in sectors)
        mixed.add(contents)
    assert len(mixed) > 8


def test_a_new_size_is_lost_until_it_is_flushed() -> None:
    cut: list[Change] = [*REPLACED, Size(FILE, 3)]
    assert {state["file"] for state in left_after(cut)} == {OLD, OLD[:3]}
    assert {state["file"] for state in left_after([*cut, Sync(FILE)])} == {OLD[:3]}


def test_every_moment_is_drawn_and_the_draw_can_be_repeated() -> None:
    changes: list[Change] = [*REPLACED, created("part", OTHER), Data(OTHER, 0, NEW), RENAME]
    recording = Recording(changes, frozenset({ROOT}), frozenset())
    found = list(power_failures(recording, 10 * len(POLICIES), 3))
    assert {left.moment for left in found} == {1, 2, 5, 6, 7}
    assert found == list(power_failures(recording, 10 * len(POLICIES), 3))
    assert {left.moment for left in power_failures(recording, 200, 3, lambda moment: moment > 5)} == {6, 7}
