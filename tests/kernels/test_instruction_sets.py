"""The kernels on every instruction set that they are written for, below that of this machine and emulated ones too."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamchat.kernels import (
    build,
    check,
    check_attention,
    check_experts,
    check_matrices,
    check_moves,
    check_operations,
)
from streamchat.kernels.check_matrices import MATRICES, random_matrix
from streamchat.kernels.operations import ATTEND, PRODUCT, STORE, SUPER_32, Matrix
from tests.support.zig import find_zig

BUILDS = ("gcc-x86-64", "gcc-skylake-avx512", "clang-x86-64", "clang-haswell", "clang-icelake-server")
"""The levels that have code of their own (`lanes.h`): plain C, AVX2, AVX-512, AVX-512 with VNNI.

All other tests run what gcc compiles for this processor, and with `--processor avx2` what it compiles without AVX-512.
"""
CASES = [(*each, rows, count) for each in MATRICES for rows in (16, 48, 57) for count in (1, 3, 4, 6, 8, 15, 101)]


def compile_kernels(compiler: Sequence[str], folder: Path) -> list[str]:
    """Compiles the kernels to objects, with the product's flags, for library and drivers; returns their paths."""
    sources = [str(path) for path in sorted(build.SOURCES.glob("*.c"))]
    subprocess.run([*compiler, *build.FLAGS, "-Wall", "-Werror", "-c", *sources], check=True, cwd=folder)
    return [str(path) for path in sorted(folder.glob("*.o"))]


def link_driver(
    compiler: Sequence[str], objects: Sequence[str], to: Path, driver: str = "product_driver.c"
) -> list[str]:
    """Compiles a driver and links it with the kernels; returns its path as a command."""
    source = str(Path(__file__).parent / driver)
    flags = ["-std=c11", "-O2", "-fopenmp-simd", "-pthread", "-Wall", "-Werror", f"-I{build.SOURCES}"]
    subprocess.run([*compiler, *flags, source, *objects, "-lm", "-o", str(to)], check=True)
    return [str(to)]


def check_products(driver: Sequence[str]) -> None:
    """Compares the driver's products with NumPy's."""
    noise = np.random.default_rng(2)
    given, wanted = list[bytes](), list[Any]()
    for bits, kind, rows, count in CASES:
        columns = 512 if bits < 16 and kind >= SUPER_32 else 160
        data, meant = random_matrix(bits, rows, columns, kind)
        x = noise.standard_normal((count, columns), dtype=np.float32)
        given += [struct.pack("<5i", bits, kind, rows, columns, count), data.tobytes(), x.tobytes()]
        wanted.append(x @ meant.T)
    done = subprocess.run(driver, input=b"".join(given), capture_output=True, check=True, timeout=120)
    sizes = [expected.size for expected in wanted]
    products = np.split(np.frombuffer(done.stdout, np.float32), np.cumsum(sizes)[:-1])
    for case, found, expected in zip(CASES, products, wanted, strict=True):
        assert abs(found.reshape(expected.shape) - expected).max() <= 2e-4 * abs(expected).max(), case


def skip_unless_possible(compiler: str, level: str) -> None:
    """Skips a level that the compiler or this processor lacks."""
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    probe = subprocess.run(
        [compiler, f"-march={level}", "-xc", "-", "-c", "-o", "/dev/null"], input=b"", capture_output=True
    )
    if probe.returncode:
        pytest.skip(f"{compiler} has no -march={level}")
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    needed = {"haswell": "avx2", "skylake-avx512": "avx512bw", "icelake-server": "avx512_vnni"}.get(level, "sse2")
    if needed not in flags:
        pytest.skip(f"this processor has no {needed}")


@pytest.fixture(scope="module", params=BUILDS)
def x86(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str]]:
    """A compiler with a level, and the kernels that it compiled."""
    compiler, level = request.param.split("-", 1)
    skip_unless_possible(compiler, level)
    command = [compiler, f"-march={level}"]
    return command, compile_kernels(command, tmp_path_factory.mktemp("objects"))


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str], str]:
    """The compiler for ARM, the kernels that it compiled, and the emulator."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("needs gcc-aarch64-linux-gnu and qemu-user")
    command = [compiler, "-static"]
    return command, compile_kernels(command, tmp_path_factory.mktemp("objects")), emulator


@pytest.mark.slow
def test_products_on_x86(x86: tuple[list[str], list[str]], tmp_path: Path) -> None:
    compiler, objects = x86
    check_products(link_driver(compiler, objects, tmp_path / "driver"))


@pytest.mark.slow
def test_products_on_arm_with_neon(arm: tuple[list[str], list[str], str], tmp_path: Path) -> None:
    compiler, objects, emulator = arm
    check_products([emulator, *link_driver(compiler, objects, tmp_path / "driver")])


@pytest.mark.slow
@pytest.mark.timeout(600)  # Zig compiles the C library first
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_products_and_team_with_musl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The C library of Alpine Linux."""
    compiler = [*find_zig(tmp_path / "zig", monkeypatch), "-target", f"{os.uname().machine}-linux-musl", "-static"]
    check_products(link_driver(compiler, compile_kernels(compiler, tmp_path), tmp_path / "driver"))
    sources = [str(Path(__file__).parent / "team_stress.c"), str(build.SOURCES / "team.c")]
    flags = ["-std=gnu11", "-O1", "-pthread", f"-I{build.SOURCES}"]
    subprocess.run([*compiler, *flags, *sources, "-lm", "-o", str(tmp_path / "stress")], check=True)
    done = subprocess.run([str(tmp_path / "stress")], capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_operation_on_x86(x86: tuple[list[str], list[str]], tmp_path: Path) -> None:
    compiler, objects = x86
    made = tmp_path / "kernels.so"
    subprocess.run([*compiler, "-shared", "-pthread", *objects, "-lm", "-o", str(made)], check=True)
    subprocess.run([sys.executable, "-m", "streamchat.kernels.check", str(made), "1"], check=True, timeout=120)


class Emulated:
    """Stands for a library that only an emulator can run: passes memory to a program and back."""

    def __init__(self, command: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._command = command
        self._arrays: dict[int, Any] = {}
        for module in (check, check_attention, check_experts, check_moves, check_operations):
            monkeypatch.setattr(module, "address", self._address)
        monkeypatch.setattr(check, "declare", lambda _: None)

    def _address(self, array: Any) -> int | None:
        """Remembers the memory of the array, whole: operations may go on behind the part that they are given."""
        if array is None:
            return None
        whole = array
        while isinstance(whole.base, np.ndarray):
            whole = whole.base
        self._arrays[whole.ctypes.data] = whole
        return int(array.ctypes.data)

    def attention_partial(self, tokens: int, heads: int, queries: int, dim: int, spans: int) -> int:
        return tokens * heads * spans * queries * (dim + 2)

    def run(self, operations: Any, count: int, threads: int) -> int:
        pointers = [_refers_to(each) for each in operations]
        structures = {ctypes.addressof(operations): ctypes.sizeof(operations)}
        structures |= {ctypes.addressof(each.contents): ctypes.sizeof(each.contents) for each in pointers if each}
        return self._call(structures, count, threads)

    def dequantize(self, matrix: Any, columns: int, *arguments: int) -> None:
        rows, first, count, number, out = arguments
        head = struct.pack("<6q", columns, first, count, number, rows, out)
        given = ctypes.create_string_buffer(head + bytes(matrix._obj), len(head) + ctypes.sizeof(Matrix))
        self._call({ctypes.addressof(given): len(given)}, 0, 1)

    def write_slots(self, moves: Any, count: int, threads: int) -> int:
        assert len(moves) == count
        return self._call({ctypes.addressof(moves): ctypes.sizeof(moves)}, -1, threads)

    def read_slots(self, moves: Any, count: int, threads: int) -> int:
        assert len(moves) == count
        return self._call({ctypes.addressof(moves): ctypes.sizeof(moves)}, -2, threads)

    def _call(self, structures: dict[int, int], count: int, threads: int) -> int:
        """Runs the program with structures at these addresses, of these sizes."""
        data = {address: array.nbytes for address, array in self._arrays.items()}
        given = [struct.pack("<2q", len(structures) + len(data), len(structures))]
        for address, size in (*structures.items(), *data.items()):
            given += [struct.pack("<2q", address, size), ctypes.string_at(address, size)]
        given.append(struct.pack("<2q", count, threads))
        done = subprocess.run(self._command, input=b"".join(given), capture_output=True, check=True, timeout=120)
        at = 0
        for address, size in data.items():
            ctypes.memmove(address, done.stdout[at : at + size], size)
            at += size
        assert at == len(done.stdout)
        return 0


def _refers_to(operation: Any) -> Any:
    """Returns the pointer to a structure in an operation; it may be null."""
    if operation.kind in (ATTEND, STORE):
        return operation.each.attention
    return operation.each.product.attention if operation.kind == PRODUCT else operation.each.experts


@pytest.mark.slow
def test_every_operation_on_arm_with_neon(
    arm: tuple[list[str], list[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, objects, emulator = arm
    driver = link_driver(compiler, objects, tmp_path / "driver", "program_driver.c")
    kernels = Emulated([emulator, *driver], monkeypatch)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: kernels)
    monkeypatch.setattr(check_matrices, "_random", np.random.default_rng(1))  # as in a process of its own
    check.main("", 1)
