"""Memory limits of machine, container and shell are respected, and named when nothing fits into them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from streamchat.base import cgroups as groups
from streamchat.base.errors import ExitCode
from streamchat.base.out_of_memory import OUT_OF_MEMORY
from streamchat.cli import main as cli
from streamchat.models import limits
from tests.support.models_help import save, tiny_llama

GB = 10**9


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cgroup tree of ours, without any limit yet."""
    monkeypatch.setattr(groups, "CGROUPS", tmp_path)
    monkeypatch.setattr(groups, "MEMBERSHIP", tmp_path / "proc")
    monkeypatch.setattr(limits, "_address_space_limit", lambda: None)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 64 * GB, "total": 80 * GB}))
    return tmp_path


def write_cgroup(folder: Path, names: tuple[str, str, str], limit: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cached}\n")


@pytest.mark.parametrize(
    ("line", "at", "names"),
    [
        ("0::/user/chat", "user/chat", limits.NAMES[2]),
        ("0::/user/chat", "user", limits.NAMES[2]),  # the limit of a parent counts, too
        ("0::/of/the/host", "", limits.NAMES[2]),  # inside a container
        ("4:memory:/docker/1", "memory/docker/1", limits.NAMES[1]),
        ("7:cpu,memory:/a", "memory", limits.NAMES[1]),
        ("7:cpu,memory:/a", "cpu,memory/a", limits.NAMES[1]),  # without the link from `memory`
    ],
)
def test_a_cgroup_limits_the_memory(cgroups: Path, line: str, at: str, names: tuple[str, str, str]) -> None:
    (cgroups / "proc").write_text(f"9:cpuset:/x\n{line}\n")
    write_cgroup(cgroups / at, names, str(3 * GB), used=2 * GB, cached=GB // 2)
    assert limits.available_memory() == 3 * GB // 2


def test_doctor_shows_the_memory_that_a_model_may_use(cgroups: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cgroups / "proc").write_text("0::/\n")
    write_cgroup(cgroups, limits.NAMES[2], str(3 * GB), used=2 * GB, cached=0)
    cli.main(["doctor", "--json"])
    device = json.loads(capsys.readouterr().out)["device"]
    assert (device["memory bytes"], device["free bytes"]) == (80 * GB, GB)


def test_no_limit_leaves_the_machine_s_memory(cgroups: Path) -> None:
    assert limits.available_memory() == 64 * GB
    (cgroups / "proc").write_text("0::/user\n")
    write_cgroup(cgroups / "user", limits.NAMES[2], "max", used=2 * GB, cached=0)
    assert limits.available_memory() == 64 * GB


def test_the_address_space_limits_the_memory(cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = psutil.Process().memory_info().vms
    monkeypatch.setattr(limits, "_address_space_limit", lambda: used + GB)
    assert GB // 2 < limits.available_memory() <= GB
    monkeypatch.setattr(limits, "_address_space_limit", lambda: used - GB)
    assert limits.available_memory() == 0


def run_limited(kilobytes: int, arguments: str) -> subprocess.CompletedProcess[str]:
    """The program in a shell that allows this much memory."""
    command = f"ulimit -v {kilobytes}; echo Hello | {sys.executable} -m streamchat {arguments}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("kilobytes", [100_000, 300_000, 1_200_000])
@pytest.mark.parametrize("is_folder", [False, True])
def test_a_shell_that_allows_too_little_memory_is_named(kilobytes: int, is_folder: bool, tmp_path: Path) -> None:
    model = f"--model {save(tiny_llama(), tmp_path / 'model')}" if is_folder else ""
    done = run_limited(kilobytes, model)
    assert done.returncode == 3
    assert f"limits the memory of a program to {kilobytes * 1.024e-3:,.0f} MB" in done.stderr
    assert "needs 1,250 MB; run" in done.stderr
    assert "ulimit -v unlimited" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("kilobytes", [14_000, 25_000, 60_000])
@pytest.mark.parametrize("arguments", ["", "sessions list"])
def test_a_shell_that_allows_too_little_memory_for_imports_is_named(kilobytes: int, arguments: str) -> None:
    done = run_limited(kilobytes, arguments)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("streamchat: ")
    assert "ulimit -v" in done.stderr
    assert done.stderr.count("\n") == 1


def test_memory_that_runs_out_while_an_error_is_reported_is_named() -> None:
    code = (
        "import streamchat.__main__ as entry\n"
        "def fails(argv):\n    raise MemoryError\n"
        "entry._main = fails\nprint(entry.main([]))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (ExitCode.MODEL, "")
    assert done.stderr == f"streamchat: {OUT_OF_MEMORY}\n"


def test_doctor_names_the_limit_of_the_shell_and_shows_the_rest() -> None:
    done = run_limited(200_000, "doctor")
    assert done.returncode == 1
    assert "problem: device: this shell limits the memory of a program to 205 MB" in done.stdout
    assert "problem: chat: this shell limits the memory of a program to 205 MB" in done.stdout
    assert "files" in done.stdout


def test_python_without_docstrings_is_refused() -> None:
    command = [sys.executable, "-OO", "-m", "streamchat"]
    done = subprocess.run(command, input="Hello", capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("streamchat: Python runs without docstrings (-OO or PYTHONOPTIMIZE=2)")


def test_without_a_folder_for_temporary_files_torch_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_get_default_tempdir", full)
    monkeypatch.setenv("TMPDIR", "/no/such/folder")
    limits.check_start()
    assert tempfile.gettempdir() == os.path.abspath("/no/such/folder")
