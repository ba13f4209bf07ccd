"""Reads values of `sysctl`, by which macOS describes the machine. Other systems have none of them."""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any


def is_macos() -> bool:
    """Return whether this is macOS."""
    return sys.platform == "darwin"


def read_text(name: str) -> str:
    """Return a value that is text, such as `machdep.cpu.brand_string`; '' if there is none of this name."""
    return _read(name).rstrip(b"\0").decode(errors="replace")


def read_number(name: str) -> int | None:
    """Return a value that is an integer of 4 or 8 bytes, such as `hw.physicalcpu`; None if there is none."""
    value = _read(name)
    return int.from_bytes(value, sys.byteorder) if len(value) in (4, 8) else None


def _read(name: str) -> bytes:
    """Return the bytes of a value; none if it does not exist."""
    function = _function()
    size = ctypes.c_size_t()
    if function is None or function(name.encode(), None, ctypes.byref(size), None, 0):
        return b""
    buffer = ctypes.create_string_buffer(size.value)
    if function(name.encode(), buffer, ctypes.byref(size), None, 0):
        return b""
    return buffer.raw[: size.value]


@functools.cache
def _function() -> Any:
    """Return `sysctlbyname` of the C library; None on systems other than macOS."""
    return _declare(ctypes.CDLL(None)) if is_macos() else None


def _declare(library: Any) -> Any:
    function = library.sysctlbyname
    size = ctypes.POINTER(ctypes.c_size_t)
    function.argtypes = [ctypes.c_char_p, ctypes.c_void_p, size, ctypes.c_void_p, ctypes.c_size_t]
    function.restype = ctypes.c_int
    return function
