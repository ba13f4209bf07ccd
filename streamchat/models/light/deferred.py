"""Defers imports inside transformers: a name that is imported, but not used, does not load its module.

`import transformers.modeling_utils` runs statements such as `from torch.distributed.tensor import DTensor`, which take
longer than all of transformers itself, for names that matter only in other programs. Inside `deferring`, such a
statement gets a stand-in for each name. Whatever uses a stand-in (calls it, reads an attribute, subclasses it, ...)
loads the real module. When that module is loaded, for whatever reason, the real objects replace all stand-ins for its
names in all modules of transformers. Until then no instance of its classes exists, so
`isinstance` needs no import.
"""

from __future__ import annotations

import builtins
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import resolve_name
from types import ModuleType
from typing import Any

from streamchat.models.light.import_hooks import when_imported

PACKAGE = "transformers"
_state = threading.local()
"""`active` is True inside `deferring`, on its thread."""


class StandIn:
    """Stands for a name of a module that is not imported yet.

    Args:
        module: Full name of the module.
        name: The name in it.
        also: Modules that must run before the object is used: they register themselves in it.
    """

    def __init__(self, module: str, name: str, also: tuple[str, ...] = ()) -> None:
        self.__dict__.update(_module=module, _name=name, _also=also)

    def _real(self) -> Any:
        with _paused():
            for name in self._also:
                import_module(name)
            return getattr(import_module(self._module), self._name)

    def __repr__(self) -> str:
        return f"<stand-in for {self._module}.{self._name}>"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._real(), name, value)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._real()(*args, **options)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._real(),)

    def __instancecheck__(self, instance: object) -> bool:
        return self._module in sys.modules and isinstance(instance, self._real())

    def __subclasscheck__(self, subclass: type) -> bool:
        return self._module in sys.modules and issubclass(subclass, self._real())

    def __or__(self, other: Any) -> Any:
        return self._real() | other

    def __ror__(self, other: Any) -> Any:
        return other | self._real()

    def __eq__(self, other: object) -> bool:
        return bool(self._real() == other)

    def __hash__(self) -> int:
        return hash(self._real())

    def __getitem__(self, key: Any) -> Any:
        return self._real()[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._real()[key] = value

    def __contains__(self, key: Any) -> bool:
        return key in self._real()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._real())

    def __len__(self) -> int:
        return len(self._real())

    def __bool__(self) -> bool:
        return bool(self._real())


class _StandIns:
    """What `from MODULE import NAME` reads names from."""

    def __init__(self, module: str, registries: Mapping[str, tuple[str, ...]]) -> None:
        self._module, self._registries = module, registries

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = StandIn(self._module, name, self._registries.get(f"{self._module}.{name}", ()))
        for module in (self._module, *made.__dict__["_also"]):
            when_imported(module, lambda _: _replace(made))
        return made


def _replace(stand_in: StandIn) -> None:
    """Replace `stand_in` by the real object in all modules of transformers, if its modules have run."""
    wanted = stand_in.__dict__
    if not all(name in sys.modules for name in (wanted["_module"], *wanted["_also"])):
        return
    real = getattr(sys.modules[wanted["_module"]], wanted["_name"], stand_in)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == PACKAGE:
            space = vars(module)
            for key in [key for key, value in list(space.items()) if value is stand_in]:
                space[key] = real


@contextmanager
def deferring(modules: frozenset[str], registries: Mapping[str, tuple[str, ...]]) -> Iterator[None]:
    """Defer imports of names from `modules` inside this block, in modules of transformers and on this thread.

    This replaces `__import__` and adds no finder, because only `__import__` knows the importing module. For all other
    code, and after the block, the same statement imports the real module.

    Args:
        modules: Full names. Those that are imported already are not deferred.
        registries: Full name of an object -> modules that add entries to it when they are imported. Other modules that
            import the object get a stand-in, which loads these modules first.
    """
    own: Any = builtins.__import__

    def replacement(
        name: str,
        globals: Mapping[str, Any] | None = None,  # noqa: A002 - the names of `__import__`
        locals: Mapping[str, Any] | None = None,  # noqa: A002
        fromlist: Any = (),
        level: int = 0,
    ) -> Any:
        importer = "" if globals is None else str(globals.get("__name__"))
        if fromlist and getattr(_state, "active", False) and importer.partition(".")[0] == PACKAGE:
            package = "" if globals is None else str(globals.get("__package__"))
            wanted = resolve_name("." * level + name, package) if level else name
            if wanted in modules and wanted not in sys.modules:
                return _StandIns(wanted, registries)
            fillers = [registries.get(f"{wanted}.{each}") for each in fromlist]
            if any(each is not None and importer not in each for each in fillers):
                module = own(name, globals, locals, fromlist, level)
                return _WithRegistries(module, wanted, registries)
        return own(name, globals, locals, fromlist, level)

    builtins.__import__ = replacement
    _state.active = True
    try:
        yield
    finally:
        _state.active = False
        if builtins.__import__ is replacement:
            builtins.__import__ = own


class _WithRegistries:
    """A module whose registries are stand-ins."""

    def __init__(self, module: ModuleType, name: str, registries: Mapping[str, tuple[str, ...]]) -> None:
        self._module, self._stand_ins = module, _StandIns(name, registries)
        self._deferred = {key.rpartition(".")[2] for key in registries if key.rpartition(".")[0] == name}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stand_ins if name in self._deferred else self._module, name)


@contextmanager
def _paused() -> Iterator[None]:
    """Import everything for real inside this block."""
    before = getattr(_state, "active", False)
    _state.active = False
    try:
        yield
    finally:
        _state.active = before
