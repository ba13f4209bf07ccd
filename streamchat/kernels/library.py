"""Python access to the compiled kernels."""

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
        """(program, its length, threads): runs the operations one after the other."""
        self.product_scratch = loaded.product_scratch
        """(columns) -> scratch floats per vector of a product."""
        self.attention_scratch = loaded.attention_scratch
        """(num_kv_heads, num_kv_groups, head_dim, spans) -> scratch floats."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Kernels:
        return self  # copies of a model share the library


def load_kernels(setting: str) -> Kernels | None:
    """Return the compiled kernels, compiling them at first use (about 2 s).

    Returns None if there are none; `why_unavailable` says why.

    Args:
        setting: The `kernels` setting: `auto` uses compiled kernels if available, `torch` does not.
    """
    return _loaded()[0] if setting == "auto" else None


def why_unavailable(setting: str) -> str:
    """Return why `load_kernels` returns None; '' if it does not."""
    return _loaded()[1] if setting == "auto" else f"kernels = {setting!r} was chosen"


@functools.cache
def _loaded() -> tuple[Kernels | None, str]:
    try:
        loaded = ctypes.CDLL(library().loadable)
        found = Kernels(loaded)
        if not _shares_threads(loaded):
            raise KernelsUnavailableError("compiled kernels would not share PyTorch's OpenMP thread pool")
    except (KernelsUnavailableError, OSError, AttributeError) as error:
        _log.info("no compiled kernels: %s", error)
        return None, str(error)
    return found, ""


def _shares_threads(loaded: Any) -> bool:
    """Return whether PyTorch uses the same OpenMP runtime: threads of two pools would compete for the cores."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        return bool(loaded.pool_threads() == before + 1)
    finally:
        torch.set_num_threads(before)
