"""What tests of the compiled kernels share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from streamchat.kernels import build
from streamchat.kernels.library import load_kernels, why_unavailable
from streamchat.kernels.operations import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
)

QUICK_FLAGS = tuple("-Og" if flag == "-O3" else flag for flag in build.FLAGS)
"""Compile in a third of the time, for tests of how kernels are stored, checked, and loaded."""

_QUICK_COMPILER = """#!/bin/sh
for word; do
    shift
    if [ "$word" = -O3 ]; then word=-Og; fi
    set -- "$@" "$word"
done
exec {compiler} "$@"
"""


def quick_compiler(folder: Path) -> str:
    """Write a compiler for CC that does the same as `QUICK_FLAGS` in processes that a test starts; return its path."""
    path = folder / "quick-compiler"
    path.write_text(_QUICK_COMPILER.format(compiler=build.find_compiler()[0]))
    path.chmod(0o755)
    return str(path)


needs_kernels = pytest.mark.skipif(load_kernels("auto") is None, reason=why_unavailable("auto"))


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


FORMATS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
