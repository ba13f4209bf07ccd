"""Marks functions of transformers for torch.compile without importing its compiler (torch._dynamo), which takes 0.5 s.

transformers decorates a few functions at import. The marks matter only once something is compiled, and nothing can be
compiled before torch._dynamo is imported. So they are set then, whoever imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from streamchat.models.light.import_hooks import when_imported

COMPILER = "torch._dynamo"


@contextmanager
def postponed_marks(package: str) -> Iterator[None]:
    """Postpone the marks of functions of `package` inside this block, until torch._dynamo is imported."""
    import torch
    from torch import compiler

    public: Any = compiler
    own = {name: getattr(public, name) for name in ("allow_in_graph", "disable")}
    marks = _Marks(package)
    for name in own:
        setattr(public, name, getattr(marks, name))
    space = vars(torch)
    if "_dynamo" not in space:
        space["_dynamo"] = marks
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(public, name, function)
        if space.get("_dynamo") is marks:
            del space["_dynamo"]


class _Marks:
    """Replaces `torch._dynamo` until it is imported: decorators are postponed, other attributes import it."""

    def __init__(self, package: str) -> None:
        self._package = package

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(COMPILER), name)

    def allow_in_graph(self, fn: Any) -> Any:
        """Mark `fn` once torch._dynamo is imported. It registers the function and returns it unchanged."""
        if not self._is_ours(fn):
            return self.__getattr__("allow_in_graph")(fn)
        when_imported(COMPILER, lambda module: module.allow_in_graph(fn))
        return fn

    def assume_constant_result(self, fn: Any) -> Any:
        """Mark `fn` as torch._dynamo does, which only sets this attribute."""
        fn._dynamo_marked_constant = True
        return fn

    def disable(self, fn: Any = None, recursive: bool = True, **options: Any) -> Any:
        """Return `fn` in a wrapper that imports torch._dynamo when it is called.

        Uses the wrapper of torch's own functions, which is private; if torch lacks it, imports torch._dynamo now.
        """
        if fn is None:  # `@disable(recursive=False)`
            return lambda function: self.disable(function, recursive, **options)
        if self._is_ours(fn) and not any(options.values()):
            wrapper: Callable[..., Any] | None = getattr(import_module("torch._compile"), "_disable_dynamo", None)
            if wrapper is not None:
                return wrapper(fn, recursive)
        return self.__getattr__("disable")(fn, recursive, **options)

    def _is_ours(self, function: object) -> bool:
        return callable(function) and str(getattr(function, "__module__", "")).partition(".")[0] == self._package
