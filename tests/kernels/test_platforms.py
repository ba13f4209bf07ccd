"""How the kernels are compiled and loaded on each system. macOS is simulated: a script stands for its compiler."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from streamchat.base import child_processes, sysctl
from streamchat.kernels import build, library, platforms
from streamchat.kernels.build import KernelsUnavailableError
from streamchat.kernels.library import load_kernels, why_unavailable
from streamchat.kernels.sealed import CHECKSUM_BYTES
from tests.support.kernels import QUICK_FLAGS

CLANG = """#!/bin/sh
echo "$@" >> {log}
case "$*" in *-march=native*|*{refused}*) echo "clang: error: unsupported argument 'native'" >&2; exit 1;; esac
for word; do
    shift
    case "$word" in -dynamiclib) word=-shared;; -mcpu=native) continue;; esac
    set -- "$@" "$word"
done
exec {compiler} "$@"
"""
"""Clang as Apple's for ARM: refuses some flags, and knows -dynamiclib."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and nothing loaded yet."""
    monkeypatch.setenv("STREAMCHAT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build, "FLAGS", QUICK_FLAGS)
    monkeypatch.setattr(library, "_loaded", functools.cache(library._loaded.__wrapped__))
    return tmp_path / "home"


@pytest.fixture
def mac(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Mac with Apple silicon; returns the temporary folder."""
    values = {"machdep.cpu.brand_string": "Apple M2 Pro"}
    monkeypatch.setattr(platforms, "is_macos", lambda: True)
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(sysctl, "read_text", lambda name: values.get(name, ""))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    return temporary


def clang(folder: Path, refused: str = "-none") -> tuple[str, Callable[[], list[list[str]]]]:
    """Returns the path of a compiler, and a function that returns the arguments of each of its runs."""
    found = next(filter(None, map(shutil.which, build.COMPILERS)), None)
    if not found:
        pytest.skip("no C compiler")
    path, log = folder / "clang", folder / "log"
    path.write_text(CLANG.format(log=log, compiler=found, refused=refused))
    path.chmod(0o755)
    return str(path), lambda: [line.split() for line in log.read_text().splitlines()]


@pytest.mark.slow
def test_macos_loads_a_private_copy_of_the_stored_library(
    mac: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, runs = clang(tmp_path)
    monkeypatch.setenv("CC", program)
    checks: list[tuple[str, bytes, int]] = []
    run = child_processes.run

    def watch(command: Sequence[str], **options: Any) -> Any:
        if command[0] == sys.executable:
            path = Path(command[-2])
            checks.append((str(path), path.read_bytes(), path.parent.stat().st_mode & 0o777))
        return run(command, **options)

    monkeypatch.setattr(child_processes, "run", watch)
    made = build.library()
    assert made.path.suffix == ".dylib"
    assert [("-dynamiclib" in words, "-shared" in words, "-mcpu=native" in words) for words in runs()] == [
        (True, False, True)
    ]
    # the check and the program load a copy without the checksum, which is gone afterwards
    ((name, content, mode),) = checks
    assert Path(name).parent.parent == mac
    assert Path(name).suffix == ".dylib"
    assert content == made.path.read_bytes()[:-CHECKSUM_BYTES]
    assert mode == 0o700
    made.path.write_bytes(b"something else")
    assert made.path.stat().st_ino == os.fstat(made.descriptor).st_ino
    made.path.unlink()
    made = build.library()
    assert load_kernels("auto") is not None, why_unavailable("auto")
    assert list(mac.iterdir()) == []
    if Path("/proc/self/maps").exists():
        assert str(made.path) not in Path("/proc/self/maps").read_text()
    assert len(runs()) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("refused", "last"), [("-none", "-mcpu=native"), ("-mcpu=native", "")])
def test_a_compiler_that_does_not_know_this_processor_compiles_for_the_architecture(
    mac: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str, last: str
) -> None:
    program, runs = clang(tmp_path, refused)
    monkeypatch.setenv("CC", program)
    assert build.library().path.is_file()
    tried = [next((word for word in words if word.endswith("=native")), "") for words in runs()]
    assert tried == (["-mcpu=native"] if last else ["-mcpu=native", "-march=native", ""])


def test_a_copy_that_cannot_be_written_is_told(mac: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, _ = clang(tmp_path)
    monkeypatch.setenv("CC", program)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    assert load_kernels("auto") is None
    assert re.search(r"copied to .*missing.*: No such file", why_unavailable("auto"))


def test_another_mac_or_system_makes_another_library(
    mac: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, _ = clang(tmp_path)
    monkeypatch.setenv("CC", program)
    names = {build.library_path().name}
    monkeypatch.setattr(sysctl, "read_text", lambda name: "Apple M4" if "brand" in name else "")
    names.add(build.library_path().name)
    monkeypatch.setattr(sysctl, "read_text", lambda name: "AVX2" if "leaf7" in name else "")
    names.add(build.library_path().name)
    monkeypatch.setattr(platforms, "is_macos", lambda: False)
    names.add(build.library_path().name)
    assert len({name.partition(".")[0] for name in names}) == 4
    assert sorted(name.partition(".")[2] for name in names) == ["dylib", "dylib", "dylib", "so"]


@pytest.fixture
def stubs(mac: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A folder with the commands of macOS; returns a function that sets the exit status of `xcode-select -p`."""
    folder = tmp_path / "stubs"
    folder.mkdir()
    (folder / "gcc").write_text(f"#!/bin/sh\ntouch {tmp_path}/dialog\n")
    (folder / "gcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(platforms, "STUBS", folder)
    monkeypatch.setattr(platforms, "SELECT", str(tmp_path / "xcode-select"))

    def answer(status: int) -> None:
        (tmp_path / "xcode-select").write_text(f'#!/bin/sh\ntest "$*" = -p || exit 9\nexit {status}\n')
        (tmp_path / "xcode-select").chmod(0o755)
        platforms._has_developer_tools.cache_clear()

    monkeypatch.setattr(platforms, "_has_developer_tools", functools.cache(platforms._has_developer_tools.__wrapped__))
    return answer


def test_no_dialog_asks_to_install_the_developer_tools(
    stubs: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for named in ("", "gcc", str(tmp_path / "stubs" / "gcc")):
        monkeypatch.setenv("CC", named)
        stubs(2)
        with pytest.raises(KernelsUnavailableError, match="xcode-select --install"):
            build.library()
        stubs(0)
        assert build.find_compiler() == [str(tmp_path / "stubs" / "gcc")]
    (tmp_path / "xcode-select").unlink()
    platforms._has_developer_tools.cache_clear()
    with pytest.raises(KernelsUnavailableError, match="xcode-select --install"):
        build.library()
    assert not (tmp_path / "dialog").exists()


def test_a_compiler_from_elsewhere_needs_no_developer_tools(
    stubs: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubs(2)
    program, _ = clang(tmp_path)
    monkeypatch.setenv("CC", program)
    assert build.find_compiler() == [program]


@pytest.mark.parametrize(
    ("machine", "compiler", "flags"),
    [
        ("x86_64", ["gcc"], ["-march=native", ""]),
        ("AMD64", ["ccache", "gcc"], ["-march=native", ""]),
        ("arm64", ["clang"], ["-mcpu=native", "-march=native", ""]),
        ("aarch64", ["gcc", "-mtune=native"], ["-mcpu=native", "-march=native", ""]),
        ("x86_64", ["gcc", "-mno-avx512f"], ["-march=native", ""]),
        ("x86_64", ["gcc", "-march=haswell"], [""]),
        ("aarch64", ["clang", "-mcpu=neoverse-n1"], [""]),
    ],
)
def test_flags_for_the_processor(
    monkeypatch: pytest.MonkeyPatch, machine: str, compiler: list[str], flags: list[str]
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert list(platforms.processor_flags(compiler)) == flags


@pytest.mark.slow
@pytest.mark.parametrize(("compiler", "words"), [("gcc", "-mno-avx512f"), ("clang", "-march=haswell")])
def test_flags_of_cc_are_obeyed(home: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, words: str) -> None:
    if not shutil.which(compiler) or not shutil.which("objdump"):
        pytest.skip(f"needs {compiler} and objdump")
    if "avx512" not in platforms.processor_features():
        pytest.skip("this processor has no AVX-512")
    monkeypatch.setenv("CC", f"{compiler} {words}")
    done = subprocess.run(
        ["objdump", "-d", str(build.library().path)], capture_output=True, text=True, check=True, timeout=120
    )
    assert re.search(r"%ymm\d", done.stdout)
    assert not re.search(r"%zmm\d", done.stdout)


def test_the_copy_is_for_this_user_only(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms, "is_macos", lambda: True)
    with open(tmp_path / "sealed", "w+b") as file:
        file.write(b"library" + bytes(CHECKSUM_BYTES))
        file.flush()
        with build._loadable(file.fileno()) as name:
            found = Path(name).parent.stat()
            assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (os.getuid(), 0o700)
            assert Path(name).read_bytes() == b"library"
        assert not Path(name).parent.exists()
