"""Files are replaced whole or not at all, and are on the disk where they must last."""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import stat
from pathlib import Path

import pytest

from streamchat.base import paths
from streamchat.base.atomic_files import SHARED, advice_on, advice_or, atomic_write, write_json, write_new, write_text


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is flushed and renamed, in order."""
    noted: list[tuple[str, str]] = []
    fsync, replace = paths.fsync, os.replace

    def note_sync(path: Path) -> None:
        noted.append(("fsync", "folder" if path.is_dir() else path.read_text(encoding="utf-8")))
        fsync(path)

    def note_rename(source: Path, target: Path) -> None:
        noted.append(("rename", target.name))
        replace(source, target)

    monkeypatch.setattr(paths, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_rename)
    return noted


def test_a_file_is_replaced_whole_and_only_the_user_can_read_it(tmp_path: Path) -> None:
    target = tmp_path / "new folder" / "file"
    write_text(target, "old", durable=False)
    with atomic_write(target, durable=False) as partial:
        partial.write_text("new", encoding="utf-8")
        assert target.read_text(encoding="utf-8") == "old"
    assert target.read_text(encoding="utf-8") == "new"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (target.parent, target)] == [0o700, 0o600]
    assert os.listdir(target.parent) == ["file"]


def test_a_file_for_others_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "page.html", "", durable=False, mode=SHARED)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "page.html").stat().st_mode) == 0o640


def test_what_must_last_is_on_the_disk_before_it_has_its_name(tmp_path: Path, steps: list[tuple[str, str]]) -> None:
    write_text(tmp_path / "file", "text", durable=True)
    assert steps == [("fsync", "text"), ("rename", "file"), ("fsync", "folder")]


def test_what_can_be_computed_again_is_not_flushed(tmp_path: Path, steps: list[tuple[str, str]]) -> None:
    write_text(tmp_path / "file", "text", durable=False)
    assert steps == [("rename", "file")]


@pytest.mark.parametrize("name", ["file", "a [b]*"])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    write_text(target, "old", durable=False)

    def stopped_half_way() -> None:
        with atomic_write(target, durable=True) as partial:
            partial.write_text("half", encoding="utf-8")
            Path(f"{partial}-journal").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped_half_way()
    assert (target.read_text(encoding="utf-8"), os.listdir(tmp_path)) == ("old", [name])


def test_nothing_is_kept_for_a_written_file(tmp_path: Path) -> None:
    """Each file had a pattern of its own, to find what was left of it: compiled and kept."""
    write_text(tmp_path / "file", "", durable=False)
    patterns = sum(isinstance(each, re.Pattern) for each in gc.get_objects())
    for _ in range(20):
        write_text(tmp_path / "file", "", durable=False)
    assert sum(isinstance(each, re.Pattern) for each in gc.get_objects()) == patterns


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_json(tmp_path / "file", [1], durable=True)
    monkeypatch.setattr(paths, "fsync", full)
    with pytest.raises(OSError, match="No space left") as failure:
        write_json(tmp_path / "file", [2], durable=True)
    assert advice_on(failure.value.errno) == "free some disk space"
    assert advice_or(failure.value.errno, "choose another name") == "free some disk space"
    assert advice_or(errno.EACCES, "choose another name") == "choose another name"
    assert (json.loads((tmp_path / "file").read_text()), os.listdir(tmp_path)) == ([1], ["file"])


def test_text_that_cannot_be_encoded_is_written_all_the_same(tmp_path: Path) -> None:
    write_text(tmp_path / "text", "a\udcff", durable=False)
    write_json(tmp_path / "json", "a\udcff", durable=False)
    assert (tmp_path / "text").read_bytes() == b"a?"
    assert json.loads((tmp_path / "json").read_bytes()) == "a\udcff"


def test_a_new_file_takes_the_place_of_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    write_new(target, "first", durable=True)
    with pytest.raises(FileExistsError):
        write_new(target, "second", durable=True)
    assert (target.read_text(encoding="utf-8"), stat.S_IMODE(target.stat().st_mode)) == ("first", 0o600)

    def fail(_: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(paths, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        write_new(tmp_path / "other", "text", durable=True)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("has_links", [True, False])
def test_a_new_file_is_never_there_without_its_contents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    """Where there are hard links; elsewhere the name is taken first."""
    target, seen = tmp_path / "file", list[str]()

    def look(path: Path) -> None:
        seen.append(path.name if not target.exists() else f"{path.name}: {target.read_text()}")

    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(paths, "fsync", look)
    if not has_links:
        monkeypatch.setattr(os, "link", refused)
    write_new(target, "text", durable=True)
    assert seen[0].endswith(".part")
    assert seen[1:] == [f"{tmp_path.name}: text"]
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(FileExistsError):
        write_new(target, "other", durable=True)
    assert (target.read_text(), os.listdir(tmp_path)) == ("text", ["file"])


def test_the_names_of_new_folders_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(paths, "fsync", flushed.append)
    paths.private_dir(tmp_path / "one" / "two")
    assert flushed == [tmp_path, tmp_path / "one"]
    paths.private_dir(tmp_path / "one" / "two")
    assert len(flushed) == 2
