"""Zig's C compiler, which compiles for other systems: `pip install ziglang`."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest


def find_zig(cache: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """Returns the command of the compiler, which keeps its files in `cache`; skips the test if there is none."""
    patch.setenv("ZIG_GLOBAL_CACHE_DIR", str(cache))
    patch.setenv("ZIG_LOCAL_CACHE_DIR", str(cache))
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    if program := shutil.which("zig"):
        return [program, "cc"]
    pytest.skip("needs Zig (pip install ziglang)")
