"""Search paths without the current folder, for this process and its children."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from streamchat.base import child_processes, search_path
from streamchat.frontend import editor

S = os.pathsep


def test_entries_that_mean_the_current_folder_are_left_out() -> None:
    given = {
        "PATH": f"/bin{S}{S}.{S}../x{S}/usr/bin{S}",
        "PYTHONPATH": f".{S}lib",
        "LD_LIBRARY_PATH": f"{S}/opt/lib",
        "HOME": "here",
    }
    assert search_path.clean(given) == {
        "PATH": f"/bin{S}/usr/bin",
        "LD_LIBRARY_PATH": "/opt/lib",
        "HOME": "here",
        "PYTHONSAFEPATH": "1",
    }


@pytest.fixture
def unprotected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`sys.path` as `python -m` makes it in this folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), f"{tmp_path}/lib", "/abs", "/stdlib"])
    monkeypatch.setattr(search_path, "_before", {})
    return tmp_path


def test_this_process_leaves_it_out(unprotected: Path) -> None:
    environ = {"PYTHONPATH": f"lib{S}/abs", "PATH": f".{S}/bin"}
    search_path.protect("/package", environ)
    assert sys.path == ["/abs", "/stdlib"]
    assert environ == {"PYTHONPATH": "/abs", "PATH": "/bin", "PYTHONSAFEPATH": "1"}


def test_a_checkout_there_stays_behind_everything_else(unprotected: Path) -> None:
    search_path.protect(str(unprotected), {})
    assert sys.path == [f"{unprotected}/lib", "/abs", "/stdlib", str(unprotected)]


def test_a_current_folder_that_is_gone_is_no_trouble(unprotected: Path) -> None:
    unprotected.rmdir()
    search_path.protect("/package", {"PYTHONPATH": "."})
    assert "/stdlib" in sys.path


def test_the_user_s_editor_has_the_user_s_environment(
    unprotected: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "")  # so that it is put back
    monkeypatch.delenv("PYTHONSAFEPATH")
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}{S}.")
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{S}")
    search_path.protect("/package")
    assert "LD_LIBRARY_PATH" not in os.environ
    (tmp_path / "edit").write_text('#!/bin/sh\necho "$PATH|$PYTHONSAFEPATH|$LD_LIBRARY_PATH" > $1\n')
    (tmp_path / "edit").chmod(0o755)
    monkeypatch.setenv("VISUAL", str(tmp_path / "edit"))
    assert editor.edit("") == f"{os.environ['PATH']}{S}.||{S}"


def test_what_libraries_start_has_it_too_and_the_environment_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setenv("PATH", f".{S}/bin")
    monkeypatch.setenv("LD_LIBRARY_PATH", ".")
    before = dict(os.environ)
    with child_processes.safe_environment():
        assert os.environ["PATH"] == "/bin"
        assert os.environ["PYTHONSAFEPATH"] == "1"
        assert "LD_LIBRARY_PATH" not in os.environ
        assert str(child_processes.FOLDER.parent) in os.environ.get("PYTHONPATH", "") or any(
            "site-packages" in part for part in child_processes.FOLDER.parts
        )
    assert dict(os.environ) == before
