"""A fuzzing target: a function of bytes, the errors that it may raise, and the first inputs."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from streamchat.base.errors import StreamchatError
from tools.fuzz import targets

CORPUS = Path(__file__).parents[2] / "tests" / "corpus"
"""A folder for each target, with the inputs that every run starts from."""


@dataclass(frozen=True)
class Target:
    """A parser to fuzz.

    Args:
        name: Its name on the command line.
        run: Parses an input. It raises one of `refusals` to refuse it, and `AssertionError` if the result is wrong.
        seeds: Returns the first inputs, by name.
        modules: Modules and packages whose coverage guides the search.
        refusals: Errors that refuse an input; each must be one sentence.
        words: Parts of inputs that mutations insert.
        max_bytes: Maximum size of a generated input.
        suite_runs: Number of mutated inputs in the tests.
    """

    name: str
    run: Callable[[bytes], object]
    seeds: Callable[[], Mapping[str, bytes]]
    modules: tuple[str, ...]
    refusals: tuple[type[Exception], ...] = (StreamchatError,)
    words: tuple[bytes, ...] = ()
    max_bytes: int = 4096
    suite_runs: int = 100

    @property
    def folder(self) -> Path:
        """The folder of its corpus."""
        return CORPUS / self.name

    def corpus(self) -> list[bytes]:
        """Return the inputs of its corpus, by file name."""
        return [path.read_bytes() for path in sorted(self.folder.iterdir())]


def target_names() -> list[str]:
    """Return the names of all targets."""
    return sorted(module.name for module in pkgutil.iter_modules(targets.__path__))


def load_target(name: str) -> Target:
    """Import a target."""
    target = importlib.import_module(f"{targets.__name__}.{name}").TARGET
    assert isinstance(target, Target)
    assert target.name == name
    return target
