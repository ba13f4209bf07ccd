"""What tests of the compiled kernels share."""

from __future__ import annotations

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

needs_kernels = pytest.mark.skipif(load_kernels("auto") is None, reason=why_unavailable("auto"))


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


FORMATS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
