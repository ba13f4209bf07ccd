"""The kernels compile for systems on which these tests do not run. Needs Zig's C compiler: `pip install ziglang`."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from streamchat.kernels import build, platforms
from tests.support.zig import find_zig

X86, ARM = 0x01000007, 0x0100000C
"""Processors in the header of a Mach-O file."""
DYLIB = 6
SYMBOL_TABLE, LOAD_LIBRARY, SIGNATURE = 0x2, 0xC, 0x1D
"""Load commands."""
OF_THE_LINKER = {"___dso_handle", "__mh_dylib_header"}
"""Symbols that a linker may add."""


@pytest.fixture(scope="module")
def zig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The command of the C compiler."""
    with pytest.MonkeyPatch.context() as patch:
        yield find_zig(tmp_path_factory.mktemp("zig"), patch)


@dataclass
class Dylib:
    """What the header and the load commands of a shared library of macOS say."""

    processor: int
    kind: int
    libraries: set[str]
    exported: set[str]
    is_signed: bool


def text_at(content: bytes, at: int) -> str:
    return content[at : content.index(b"\0", at)].decode()


def read_dylib(content: bytes) -> Dylib:
    """Reads a 64-bit, little-endian Mach-O file; see `loader.h` and `nlist.h` of macOS."""
    magic, processor, _, kind, commands = struct.unpack_from("<5I", content)
    assert magic == 0xFEEDFACF
    found, at = Dylib(processor, kind, set(), set(), False), 32
    for _ in range(commands):
        command, size = struct.unpack_from("<2I", content, at)
        if command == LOAD_LIBRARY:
            found.libraries.add(text_at(content, at + struct.unpack_from("<I", content, at + 8)[0]))
        if command == SIGNATURE:
            found.is_signed = True
        if command == SYMBOL_TABLE:
            symbols, count, strings = struct.unpack_from("<3I", content, at + 8)
            for number in range(count):
                name, flags = struct.unpack_from("<IB", content, symbols + 16 * number)
                if flags == 0x0F:  # defined in a section, and external
                    found.exported.add(text_at(content, strings + name))
        at += size
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "processor"),
    [
        (["-target", "aarch64-macos", "-mcpu=apple_m1"], ARM),
        (["-target", "aarch64-macos", "-mcpu=apple_m4"], ARM),
        (["-target", "x86_64-macos", "-mcpu=x86_64_v3"], X86),
        (["-target", "x86_64-macos", "-mcpu=penryn"], X86),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_dylib_for_macos(
    zig: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: list[str], processor: int
) -> None:
    monkeypatch.setattr(platforms, "is_macos", lambda: True)
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-Wall", "-Werror"))
    build._compile([*zig, *target], tmp_path / "kernels.dylib")
    made = read_dylib((tmp_path / "kernels.dylib").read_bytes())
    assert (made.processor, made.kind) == (processor, DYLIB)
    assert made.exported - OF_THE_LINKER == {"_run", "_attention_partial"}
    assert made.libraries == {"/usr/lib/libSystem.B.dylib"}  # no OpenMP
    assert made.is_signed or processor == X86  # Apple silicon loads nothing else


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_a_library_for_musl(zig: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    """The C library of Alpine Linux, whose threads have stacks of 128 kB."""
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-Wall", "-Wframe-larger-than=32768", "-Werror"))
    build._compile([*zig, "-target", f"{machine}-linux-musl", "-mcpu=baseline"], tmp_path / "kernels.so")
    assert (tmp_path / "kernels.so").read_bytes()[:4] == b"\x7fELF"
