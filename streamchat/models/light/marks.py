"""Marks functions of transformers for torch.compile without importing its compiler (torch._dynamo), which takes 0.5 s.

transformers decorates a few functions at import. The marks matter only once something is compiled, and nothing can be
compiled before torch._dynamo is imported. So they are set then, whoever imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from streamchat.models.light.watch import when_imported

COMPILER = "torch._dynamo"


@contextmanager
def postponed_marks(package: str) -> Iterator[None]:
    """Postpone the marks of functions of `package` inside this block, until torch._dynamo is imported."""
    import torch
    from torch import compiler

    functions: Any = compiler
    own_allow, own_disable = functions.allow_in_graph, functions.disable

    def is_ours(function: object) -> bool:
        return callable(function) and str(getattr(function, "__module__", "")).partition(".")[0] == package

    def allow_in_graph(fn: Any) -> Any:
        if not is_ours(fn):
            return own_allow(fn)
        when_imported(COMPILER, lambda _: own_allow(fn))
        return fn

    def disable(fn: Any = None, recursive: bool = True, *, reason: str | None = None) -> Any:
        if not is_ours(fn) or reason is not None:
            return own_disable(fn, recursive, reason=reason)
        return _disabled_when_called(fn, recursive)

    functions.allow_in_graph, functions.disable = allow_in_graph, disable
    before = vars(torch).get("_dynamo")
    if before is None:
        vars(torch)["_dynamo"] = _Compiler()
    try:
        yield
    finally:
        functions.allow_in_graph, functions.disable = own_allow, own_disable
        if isinstance(vars(torch).get("_dynamo"), _Compiler):
            del vars(torch)["_dynamo"]


def _disabled_when_called(function: Callable[..., Any], recursive: bool) -> Any:
    """Return `function` with compilation disabled: torch's own wrapper, which imports torch._dynamo when it is called.

    It is private; without it, torch._dynamo is imported now.
    """
    try:
        from torch._compile import _disable_dynamo
    except ImportError:
        from torch import compiler

        return compiler.disable(function, recursive)
    return _disable_dynamo(function, recursive)


class _Compiler:
    """What `torch._dynamo` means until it is imported."""

    def assume_constant_result(self, function: Any) -> Any:
        """Mark `function` as in torch._dynamo, which only sets this attribute."""
        function._dynamo_marked_constant = True
        return function

    def __getattr__(self, name: str) -> Any:
        from importlib import import_module

        return getattr(import_module(COMPILER), name)
