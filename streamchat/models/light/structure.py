"""Caches the import structure of transformers.

`import transformers` reads all files of all its models (2,500 files, 45 MB) to learn which names they define, and
`import transformers.models` does it again. The result depends only on these files. It is stored in the cache folder
with the size and time of every file. If a file changed, or the stored result is damaged, the files are read as usual.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from streamchat.base import paths
from streamchat.base.atomic_files import read_checked, save_checked
from streamchat.models.light.import_hooks import when_imported

MODULE, FUNCTION = "transformers.utils.import_utils", "define_import_structure"
Structure = dict[frozenset[str], dict[str, set[str]]]
"""Libraries that are needed -> module -> names that it defines."""


def remember_structure() -> None:
    """Have the next import of transformers use the cached structure, or cache the one that it reads."""
    when_imported(MODULE, _wrap)


def _wrap(module: ModuleType) -> None:
    """Replace the function that reads the files, if it is there."""
    own = getattr(module, FUNCTION, None)
    if own is None or not module.__file__:
        return
    models = Path(module.__file__).parent.parent / "models"

    @functools.wraps(own)
    def define_import_structure(module_path: Any, prefix: str | None = None) -> Any:
        if Path(module_path) not in (models, models / "__init__.py"):
            return own(module_path, prefix)  # a single model: few files
        return _remembered(own, module_path, prefix, models, Path(str(module.__file__)))

    setattr(module, FUNCTION, define_import_structure)


def _remembered(own: Any, module_path: Any, prefix: str | None, models: Path, code: Path) -> Any:
    file = paths.cache_path("imports", json.dumps([str(module_path), prefix, str(code)]), ".json")
    state = _state(models, code)
    kept = read_checked(file)
    if isinstance(kept, list) and kept[:1] == [state] and (known := _decoded(kept[-1])) is not None:
        return known
    structure = own(module_path, prefix)
    if (plain := _encoded(structure)) is not None:
        save_checked(file, [state, plain], "the import structure of transformers")
    return structure


@functools.cache
def _state(models: Path, code: Path) -> str:
    """Return a digest of name, size and time of every Python file of the models, and of the code that reads them."""
    digest = hashlib.sha256()
    for path, status in [*_files(str(models)), (str(code), code.stat())]:
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _files(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir():
            if entry.name != "__pycache__":
                yield from _files(entry.path)
        elif entry.name.endswith(".py"):
            yield entry.path, entry.stat()


def _encoded(structure: Any) -> list[Any] | None:
    """Return `structure` for JSON; None if it is not a `Structure`."""
    plain = [
        [sorted(needed), {name: sorted(names) for name, names in files.items()}] for needed, files in structure.items()
    ]
    return plain if _decoded(plain) == structure else None


def _decoded(plain: Any) -> Structure | None:
    """Return the structure that `_encoded` wrote; None if it is damaged."""
    try:
        return {frozenset(needed): {str(name): set(names) for name, names in files.items()} for needed, files in plain}
    except (TypeError, ValueError, AttributeError):
        return None
