"""Values of macOS's `sysctl`, read from a C library that behaves as the manual page of `sysctlbyname` says."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import pytest

from streamchat.base import sysctl
from streamchat.kernels import build

SOURCE = r"""
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

int sysctlbyname(const char *name, void *old, size_t *old_size, void *given, size_t given_size) {
    static const char brand[] = "Apple M2 Pro";
    static const int32_t cores = 8;
    static const int64_t memory = 34359738368;
    const void *value;
    size_t size;
    if (given || given_size)
        return errno = EPERM, -1;
    if (!strcmp(name, "machdep.cpu.brand_string"))
        value = brand, size = sizeof brand;
    else if (!strcmp(name, "hw.perflevel0.physicalcpu"))
        value = &cores, size = sizeof cores;
    else if (!strcmp(name, "hw.memsize"))
        value = &memory, size = sizeof memory;
    else
        return errno = ENOENT, -1;
    if (!old)
        return *old_size = size, 0;
    if (*old_size < size)
        return errno = ENOMEM, -1;
    memcpy(old, value, size);
    *old_size = size;
    return 0;
}
"""


@pytest.fixture
def values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        compiler = build.find_compiler()
    except build.KernelsUnavailableError as error:
        pytest.skip(str(error))
    path = tmp_path / "system.so"
    subprocess.run([*compiler, "-shared", "-fPIC", "-xc", "-", "-o", str(path)], input=SOURCE, text=True, check=True)
    function = sysctl._declare(ctypes.CDLL(str(path)))
    monkeypatch.setattr(sysctl, "_function", lambda: function)


def test_values_are_read_by_name(values: None) -> None:
    assert sysctl.read_text("machdep.cpu.brand_string") == "Apple M2 Pro"
    assert sysctl.read_number("hw.perflevel0.physicalcpu") == 8
    assert sysctl.read_number("hw.memsize") == 32 << 30


def test_what_there_is_not_is_no_error(values: None) -> None:
    assert sysctl.read_text("machdep.cpu.features") == ""
    assert sysctl.read_number("hw.perflevel1.physicalcpu") is None
    assert sysctl.read_number("machdep.cpu.brand_string") is None


@pytest.mark.skipif(os.uname().sysname == "Darwin", reason="macOS has it")
def test_other_systems_have_no_values() -> None:
    assert sysctl.read_text("hw.model") == ""
    assert sysctl.read_number("hw.ncpu") is None
