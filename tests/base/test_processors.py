"""How many processors are used: those that the process may use, not those that there are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from streamchat.base import cgroups, processors, sysctl
from streamchat.base.processors import processor_quota, usable_processors
from streamchat.benchmarks import pools
from streamchat.cli import main as cli
from streamchat.models import device
from streamchat.reports import machine


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3.0),
        ("0::/a/b\n", {"a/b/cpu.max": "200000 100000\n", "a/cpu.max": "300000 100000\n"}, 2.0),
        # a container's own group, seen from inside as the root
        ("0::/docker/0123\n", {"cpu.max": "400000 100000\n"}, 4.0),
        ("4:memory:/\n3:cpu,cpuacct:/x\n", {"cpu,cpuacct/x/cpu.cfs_quota_us": "50000\n"}, None),
        (
            "4:memory:/\n3:cpu,cpuacct:/x\n",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "50000\n", "cpu,cpuacct/x/cpu.cfs_period_us": "100000\n"},
            0.5,
        ),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ("2:cpuset:/\n", {"cpuset/cpu.max": "100000 100000\n"}, None),
        ("0::/../other\n", {"cpu.max": "100000 100000\n"}, 1.0),
        ("", {}, None),
        ("nonsense\n0::\n::\n", {"cpu.max": "0 0 0\n"}, None),
        ("0::/\n", {"cpu.max": "100000 0\n"}, None),
    ],
)
def test_the_limits_of_control_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, str], quota: float | None
) -> None:
    for name, text in files.items():
        write(tmp_path / "fs" / name, text)
    write(tmp_path / "cgroup", groups)
    monkeypatch.setattr(cgroups, "CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(cgroups, "MEMBERSHIP", tmp_path / "cgroup")
    assert processor_quota() == quota
    monkeypatch.setattr(cgroups, "MEMBERSHIP", tmp_path / "none")
    assert processor_quota() is None


@pytest.fixture
def limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen processors, eight of them allowed, time for five and a half."""
    write(tmp_path / "fs" / "cpu.max", "550000 100000\n")
    write(tmp_path / "cgroup", "0::/\n")
    monkeypatch.setattr(cgroups, "CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(cgroups, "MEMBERSHIP", tmp_path / "cgroup")
    monkeypatch.setattr(processors, "TOPOLOGY", tmp_path / "cpu")
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)


def test_the_smallest_limit_counts(limited: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_processors() == 5
    assert pools.default_workers() == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3})
    assert usable_processors() == 1
    assert pools.default_workers() == 1
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS, Windows
    monkeypatch.setattr(cgroups, "MEMBERSHIP", Path("nowhere"))
    assert usable_processors() == 16


def test_hyperthreads_of_a_core_count_once(
    limited: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(8):
        core = f"{number % 4},{number % 4 + 4}\n"
        write(tmp_path / "cpu" / f"cpu{number}" / "topology" / "thread_siblings_list", core)
    assert usable_processors() == 4
    monkeypatch.setattr(cgroups, "MEMBERSHIP", Path("nowhere"))
    assert usable_processors() == 4
    cli.main(["doctor", "--json"])
    row = json.loads(capsys.readouterr().out)["device"]["processors"]
    assert row == "4 of 16: this process may run on 8 and uses one hyperthread of each of 4 cores"
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 5})  # two cores, one of them whole
    assert usable_processors() == 2


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"hw.physicalcpu": 10, "hw.perflevel0.physicalcpu": 8}, 8),  # Apple silicon
        ({"hw.physicalcpu": 6}, 6),  # Intel, with 12 hyperthreads
        ({}, 16),
    ],
)
def test_macos_tells_its_performance_cores(
    limited: None, monkeypatch: pytest.MonkeyPatch, values: dict[str, int], expected: int
) -> None:
    monkeypatch.setattr(processors, "is_macos", lambda: True)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(cgroups, "MEMBERSHIP", Path("nowhere"))
    monkeypatch.setattr(sysctl, "read_number", values.get)
    assert usable_processors() == expected


def test_doctor_names_the_performance_cores_of_a_mac(
    limited: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"hw.physicalcpu": 16, "hw.perflevel0.physicalcpu": 12}
    monkeypatch.setattr(sysctl, "read_number", values.get)
    monkeypatch.setattr(processors, "is_macos", lambda: True)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(cgroups, "MEMBERSHIP", Path("nowhere"))
    cli.main(["doctor", "--json"])
    row = json.loads(capsys.readouterr().out)["device"]["processors"]
    assert row == "12 of 16: this process uses 12 performance cores of 16 cores"


@pytest.mark.parametrize(
    ("performance", "allowed", "expected"),
    [
        ("0-3\n", range(8), 2),  # two cores of two hyperthreads each, and four efficiency cores
        ("0-1,4,5\n", range(8), 3),
        ("0-3\n", {4, 5, 6}, 3),  # kept to efficiency cores
        ("0-3\n", {2, 5}, 1),
        ("", range(8), 6),
        ("x,-3\n", range(8), 6),
    ],
)
def test_efficiency_cores_of_a_hybrid_processor_do_not_count(
    limited: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    performance: str,
    allowed: Iterable[int],
    expected: int,
) -> None:
    for number in range(8):
        siblings = f"{number // 2 * 2}-{number // 2 * 2 + 1}" if number < 4 else f"{number}"
        write(tmp_path / "cpu" / f"cpu{number}" / "topology" / "thread_siblings_list", siblings + "\n")
    write(tmp_path / "cpu_core" / "cpus", performance)
    monkeypatch.setattr(processors, "PERFORMANCE_CORES", tmp_path / "cpu_core" / "cpus")
    monkeypatch.setattr(cgroups, "MEMBERSHIP", Path("nowhere"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(allowed))
    assert usable_processors() == expected


def test_doctor_names_the_performance_cores_of_a_hybrid_processor(
    limited: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "cpus", "0-4\n")
    monkeypatch.setattr(processors, "PERFORMANCE_CORES", tmp_path / "cpus")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    cli.main(["doctor", "--json"])
    row = json.loads(capsys.readouterr().out)["device"]["processors"]
    assert row == "5 of 8: this process uses 5 performance cores of 8 cores"  # the quota of 5.5 does not matter


def test_torch_is_held_to_it(limited: None, monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    device.limit_threads()
    assert set_to == [5]
    monkeypatch.setenv("OMP_NUM_THREADS", "8")  # the user has decided
    device.limit_threads()
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    device.limit_threads()
    assert set_to == [5]


def test_doctor_says_why_not_all_are_used(
    limited: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def row() -> str:
        cli.main(["doctor", "--json"])
        return str(json.loads(capsys.readouterr().out)["device"]["processors"])

    assert row() == "5 of 16: this process may run on 8 and has a quota of 5.5 (cgroup)"
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(cgroups, "MEMBERSHIP", Path("nowhere"))
    assert row() == "8"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_a_process_that_is_kept_to_one_processor_uses_one() -> None:
    code = (
        "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from streamchat.base.processors import usable_processors\n"
        "from streamchat.benchmarks.pools import default_workers\n"
        "print(usable_processors(), default_workers())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]


def test_reports_name_the_processor_of_a_mac(limited: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "read_lines", lambda path: [])
    monkeypatch.setattr(sysctl, "read_text", {"machdep.cpu.brand_string": "Apple M2 Pro"}.get)
    assert machine.processor() == "Apple M2 Pro, 5 cores"
