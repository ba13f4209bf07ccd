"""The products on every instruction set that they are written for, below that of this machine and emulated ones too."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from streamchat.kernels import build
from streamchat.kernels.check import random_matrix

X86 = ("x86-64", "x86-64-v2", "haswell", "skylake-avx512", "icelake-server")
"""Plain C, the same with SSE 4, AVX2, AVX-512, AVX-512 with VNNI."""
CASES = [(bits, rows, 160, count) for bits in (4, 8, 16, 32) for rows in (16, 48) for count in (1, 3, 4, 6, 15, 61)]


def compile_driver(compiler: Sequence[str], to: Path) -> list[str]:
    """Compiles the kernels and the driver; returns its path as a command."""
    flags = [flag for flag in build.FLAGS if flag not in ("-shared", "-fPIC", "-fvisibility=hidden")]
    sources = [str(Path(__file__).parent / "product_driver.c"), *map(str, sorted(build.SOURCES.glob("*.c")))]
    command = [*compiler, *flags, "-Wall", "-Werror", f"-I{build.SOURCES}", *sources, "-o", str(to)]
    subprocess.run(command, check=True)
    return [str(to)]


def check_products(driver: Sequence[str]) -> None:
    """Compares the driver's products with NumPy's."""
    noise = np.random.default_rng(2)
    for bits, rows, columns, count in CASES:
        data, scales, meant = random_matrix(bits, rows, columns)
        x = noise.standard_normal((count, columns), dtype=np.float32)
        sizes = struct.pack("<4i", bits, rows, columns, count)
        given = b"".join([sizes, data.tobytes(), b"" if scales is None else scales.tobytes(), x.tobytes()])
        done = subprocess.run(driver, input=given, capture_output=True, check=True, timeout=120)
        found, expected = np.frombuffer(done.stdout, np.float32).reshape(count, rows), x @ meant.T
        assert abs(found - expected).max() <= 2e-4 * abs(expected).max(), (bits, rows, count)


@pytest.mark.slow
@pytest.mark.parametrize("level", X86)
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_products_on_x86(tmp_path: Path, compiler: str, level: str) -> None:
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    probe = subprocess.run(
        [compiler, f"-march={level}", "-xc", "-", "-c", "-o", "/dev/null"], input=b"", capture_output=True
    )
    if probe.returncode:
        pytest.skip(f"{compiler} has no -march={level}")
    driver = compile_driver([compiler, f"-march={level}"], tmp_path / "driver")
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    needed = {"haswell": "avx2", "skylake-avx512": "avx512bw", "icelake-server": "avx512_vnni"}.get(level, "sse2")
    if needed not in flags:
        pytest.skip(f"this processor has no {needed}")
    check_products(driver)


@pytest.mark.slow
def test_products_on_arm_with_neon(tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("needs gcc-aarch64-linux-gnu and qemu-user")
    driver = compile_driver([compiler, "-static"], tmp_path / "driver")
    check_products([emulator, *driver])
