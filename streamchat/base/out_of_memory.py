"""Recognizes that memory ran out. Imports no module of streamchat, and not torch: their import may be what failed."""

from __future__ import annotations

import errno

OUT_OF_MEMORY = (
    "out of memory, or the limit of this shell (ulimit -v) is reached; close other programs, raise the limit or "
    "choose a smaller model"
)
_TEXTS = (
    "not enough memory",  # torch on a CPU raises a plain RuntimeError, with a different text on each system
    "can't allocate memory",
    "std::bad_alloc",
    "Cannot allocate memory",  # safetensors, and the loader of libraries
    "failed to map segment from shared object",
)
"""Texts of errors that report a lack of memory but have a general type."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error means that memory ran out."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    is_torchs = any(each.__name__ == "OutOfMemoryError" for each in type(error).__mro__)
    return is_torchs or any(text in str(error) for text in _TEXTS)
