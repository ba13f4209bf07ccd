"""The compiled kernels as functions of Python."""

from __future__ import annotations

import ctypes
import functools
import logging
from typing import Any, Protocol

import torch

from streamchat.kernels.build import KernelsUnavailableError, library
from streamchat.kernels.operations import declare

_log = logging.getLogger(__name__)


class Kernels(Protocol):
    """The functions of `source/`; tensors are passed by address."""

    run: Any
    """(program, its length, threads): the operations one after the other."""
    product_scratch: Any
    """(columns) -> floats that a product needs for each vector."""
    attention_scratch: Any
    """(heads, queries, dim, spans) -> floats."""
    pool_threads: Any
    """() -> threads of the OpenMP runtime."""


def kernels() -> Kernels | None:
    """The compiled kernels; None where there are none, `missing()` says why. Compiles them at first."""
    return _loaded()[0]


def missing() -> str:
    """Why there are no compiled kernels; '' where there are."""
    return _loaded()[1]


@functools.cache
def _loaded() -> tuple[Kernels | None, str]:
    try:
        path = library()
        found: Any = ctypes.CDLL(str(path))
        declare(found)
        if not _shares_threads(found):
            raise KernelsUnavailableError("they would use another thread pool than PyTorch")
    except (KernelsUnavailableError, OSError, AttributeError) as error:
        _log.info("no compiled kernels: %s", error)
        return None, str(error)
    return found, ""


def _shares_threads(found: Any) -> bool:
    """Whether OpenMP is the one that PyTorch uses: threads of two pools would wait for each other's cores."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        return bool(found.pool_threads() == before + 1)
    finally:
        torch.set_num_threads(before)
