"""The GPU of the tests in `tests/gpu`: a real one, or a CPU with recorded operations instead of CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from streamchat.decode.install import install, install_captured
from tests.support.recorded_graphs import RecordedGraphs


@dataclass(frozen=True)
class TestedGpu:
    """Where a test runs, and what it may expect of it."""

    __test__ = False

    place: str
    """The device of the model: `cuda`, or `cpu` for the stand-in."""
    is_real: bool
    """Whether figures of device memory can be checked."""
    install: Callable[[Any], bool]
    """Installs the captured steps in a model."""


def real_gpu() -> TestedGpu:
    """The first CUDA device."""
    return TestedGpu("cuda", True, lambda model: install(model, None))


def stand_in() -> TestedGpu:
    """A CPU that runs what a GPU runs: the same steps, recorded and replayed operation by operation."""
    return TestedGpu("cpu", False, lambda model: install_captured(model, RecordedGraphs().record))


def allocated() -> int:
    """Bytes of live tensors on the GPU."""
    return torch.cuda.memory_allocated()
