"""Calls a function when a module has been imported, whoever imports it (PEP 369 proposed such hooks)."""

from __future__ import annotations

import importlib.abc
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Callback = Callable[[ModuleType], None]


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds what the other finders find, and wraps the loader of watched modules."""

    def __init__(self) -> None:
        self.callbacks: defaultdict[str, list[Callback]] = defaultdict(list)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.callbacks:
            return None
        for finder in list(sys.meta_path):
            if finder is not self and (spec := finder.find_spec(fullname, path, target)) is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Loads a module with its own loader, and then calls its callbacks."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        """Return what else the own loader can do: whoever only looks for the module may read its source."""
        if name == "_own":  # before __init__, such as in a copy
            raise AttributeError(name)
        return getattr(self._own, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._own.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._own
        self._own.exec_module(module)
        for callback in _watcher.callbacks.pop(module.__name__, ()):
            callback(module)
        if not _watcher.callbacks:
            sys.meta_path.remove(_watcher)


_watcher = _Watcher()


def when_imported(name: str, callback: Callback) -> None:
    """Call `callback(module)` once, right after the module `name` has run; at once if it is imported already."""
    if name in sys.modules:
        callback(sys.modules[name])
        return
    _watcher.callbacks[name].append(callback)
    if _watcher not in sys.meta_path:
        sys.meta_path.insert(0, _watcher)
