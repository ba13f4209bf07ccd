"""What killed processes left of folders that they were building."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import filelock
import pytest

from streamchat.base.progress import silent
from streamchat.models.staging import ensure


def build(folder: Path) -> Mapping[str, str]:
    (folder / "weights").write_bytes(b"1")
    return {}


def unfinished(target: Path, ending: str = "x1_y2z3a") -> Path:
    """The folder of a process that builds `target`, or was killed while it did."""
    folder = target.with_name(f".building-{target.name}-{ending}")
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights").write_bytes(b"half")
    return folder


@pytest.mark.parametrize("name", ["a-1", "other-2", "a[b]-1"])
def test_it_is_removed_when_any_folder_is_built(tmp_path: Path, name: str) -> None:
    """A conversion that ended for lack of memory is not tried again, and its files have gigabytes."""
    left = [unfinished(tmp_path / name), unfinished(tmp_path / name, "12345678")]
    ensure(tmp_path / "a-1", build, what="a", progress=silent)
    assert [folder.exists() for folder in left] == [False, False]


@pytest.mark.parametrize("name", ["other-2", "a-1-3"])
def test_what_another_process_is_building_stays(tmp_path: Path, name: str) -> None:
    running = unfinished(tmp_path / name)
    with filelock.FileLock(tmp_path / f".{name}.lock"):
        ensure(tmp_path / "a-1", build, what="a", progress=silent)
    assert (running / "model" / "weights").exists()
    shutil.rmtree(tmp_path / "a-1")
    ensure(tmp_path / "a-1", build, what="a", progress=silent)
    assert not running.exists()
