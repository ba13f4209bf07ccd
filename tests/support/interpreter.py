"""Triton's interpreter, quick enough for tests."""

from __future__ import annotations

import os
from typing import Any

import pytest

IS_ON = os.environ.get("TRITON_INTERPRET") == "1"
needs_interpreter = pytest.mark.skipif(not IS_ON, reason="needs Triton and TRITON_INTERPRET=1; see .ci/check")


def patch_once() -> None:
    """Have the interpreter replace Triton's language once, instead of at each call of a function of a kernel.

    It takes a third of the time otherwise.
    """
    pytest.importorskip("triton")
    from triton.runtime import interpreter

    replace: Any = interpreter._patch_lang
    if getattr(replace, "is_once", False):
        return
    scopes: dict[str, Any] = {}

    def once(fn: Any) -> Any:
        module: str = fn.__module__
        if module not in scopes:
            scopes[module] = replace(fn)
        return type(scopes[module])()  # nothing to restore

    once.is_once = True  # type: ignore[attr-defined]
    interpreter._patch_lang = once
