"""Changes the program in this process."""

from __future__ import annotations

import gc
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from types import CodeType, FunctionType, ModuleType

from tools.mutation.mutants import ROOT, Mutant, mutated_tree

OWN_PACKAGES = ("streamchat", "tests", "tools")


def change_functions(mutant: Mutant) -> bool:
    """Change the functions that exist; return False if that is impossible, so that the modules must be imported again.

    Every function keeps its identity, so all modules that imported it, and all methods, change with it.
    """
    if not mutant.function:
        return False
    file = str(ROOT / mutant.path)
    new = {_place(code): code for code in _codes(compile(mutated_tree(mutant.path, mutant.number), file, "exec"))}
    for each in gc.get_objects():
        if type(each) is FunctionType and each.__code__.co_filename == file and _place(each.__code__) in new:
            try:
                each.__code__ = new[_place(each.__code__)]
            except ValueError:  # it has other free variables now
                return False
    return True


def change_imports(mutant: Mutant) -> None:
    """Let the next import of the module import the mutant."""
    sys.meta_path.insert(0, _Finder(mutant))


def forget_modules() -> None:
    """Let the next import of a module of this repository execute it again."""
    for name in list(sys.modules):
        if name.split(".")[0] in OWN_PACKAGES and not name.startswith("tools.mutation"):
            del sys.modules[name]


def _place(code: CodeType) -> tuple[str, int]:
    return code.co_qualname, code.co_firstlineno


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _codes(each)


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, mutant: Mutant) -> None:
        super().__init__(name, str(ROOT / mutant.path))
        self._number, self._of = mutant.number, mutant.path

    def get_code(self, fullname: str) -> CodeType:
        return compile(mutated_tree(self._of, self._number), self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, mutant: Mutant) -> None:
        self._name = mutant.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        self._mutant = mutant

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        loader = _Loader(fullname, self._mutant)
        return importlib.util.spec_from_file_location(fullname, loader.path, loader=loader)
