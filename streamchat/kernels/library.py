"""The compiled kernels as functions of Python."""

from __future__ import annotations

import ctypes
import functools
import logging
from typing import Any

import torch

from streamchat.kernels.build import KernelsUnavailableError, library
from streamchat.kernels.operations import declare

_log = logging.getLogger(__name__)


class Kernels:
    """The functions of `source/`; tensors are passed by address."""

    def __init__(self, loaded: Any) -> None:
        declare(loaded)
        self.run = loaded.run
        """(program, its length, threads): the operations one after the other."""
        self.product_scratch = loaded.product_scratch
        """(columns) -> floats that a product needs for each vector."""
        self.attention_scratch = loaded.attention_scratch
        """(heads, queries, dim, spans) -> floats."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Kernels:
        return self  # a copied model uses the same library


_allowed = True


def allow(choice: str) -> None:
    """`auto`: compiled kernels are used from now on where there are some; `torch`: they are not."""
    global _allowed
    _allowed = choice == "auto"


def kernels() -> Kernels | None:
    """The compiled kernels; None where there are none, `missing()` says why. Compiles them at first (some 2 s)."""
    return _loaded()[0] if _allowed else None


def missing() -> str:
    """Why there are no compiled kernels; '' where there are."""
    return _loaded()[1] if _allowed else "kernels = 'torch' was chosen"


@functools.cache
def _loaded() -> tuple[Kernels | None, str]:
    try:
        loaded = ctypes.CDLL(library().loadable)
        found = Kernels(loaded)
        if not _shares_threads(loaded):
            raise KernelsUnavailableError("they would use another thread pool than PyTorch")
    except (KernelsUnavailableError, OSError, AttributeError) as error:
        _log.info("no compiled kernels: %s", error)
        return None, str(error)
    return found, ""


def _shares_threads(loaded: Any) -> bool:
    """Whether OpenMP is the one that PyTorch uses: threads of two pools would wait for each other's cores."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        return bool(loaded.pool_threads() == before + 1)
    finally:
        torch.set_num_threads(before)
