"""Keep the current folder out of the search paths for modules, programs and libraries, here and in child processes.

Imports only modules that Python itself has already loaded at startup: see `streamchat.__main__`.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

VARIABLES = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
"""Variables with lists of folders. A relative or empty entry means the current folder or one below it."""
SAFE_PATH = "PYTHONSAFEPATH"
"""If set, `python -c` and `python -m` do not look for modules in the current folder (like the flag -P)."""

_before: dict[str, str | None] = {}


def absolute_entries(folders: str) -> str:
    """Return `folders` without its relative and empty entries."""
    return os.pathsep.join(entry for entry in folders.split(os.pathsep) if os.path.isabs(entry))


def clean(environ: "Mapping[str, str]") -> dict[str, str]:
    """Return a copy of `environ` for child processes, without the current folder in its search paths."""
    cleaned = {**environ, SAFE_PATH: "1"}
    for name in VARIABLES:
        if name in cleaned:
            cleaned[name] = absolute_entries(cleaned[name])
            if not cleaned[name]:
                del cleaned[name]  # an empty list also means the current folder
    return cleaned


def protect(package_root: str, environ: "MutableMapping[str, str]" = os.environ) -> None:
    """Remove the current folder from `sys.path` and from the environment of later child processes.

    `python -m` puts the current folder first in `sys.path`; PYTHONPATH may add it anywhere.

    Args:
        package_root: The folder that contains streamchat. If it is one of those entries, it moves to the end of
            `sys.path`.
        environ: Changed in place; `users_environment` returns the original.
    """
    try:
        here = os.getcwd()
    except OSError:  # deleted
        here = ""
    relative = [each for each in environ.get("PYTHONPATH", "").split(os.pathsep) if not os.path.isabs(each)]
    unwanted = [os.path.abspath(each) for each in relative] if here and environ.get("PYTHONPATH") else []
    if not sys.flags.safe_path and sys.path and sys.path[0] in ("", here):
        unwanted.append(sys.path[0])
    for entry in unwanted:
        if entry in sys.path:
            sys.path.remove(entry)
            if os.path.realpath(entry or here) == os.path.realpath(package_root):
                sys.path.append(package_root)
    cleaned = clean(environ)
    for name in (*VARIABLES, SAFE_PATH):
        if environ.get(name) != cleaned.get(name):
            _before.setdefault(name, environ.get(name))
            if name in cleaned:
                environ[name] = cleaned[name]
            else:
                del environ[name]


def users_environment() -> dict[str, str]:
    """Return the environment as the user set it, for a program that the user chose (an editor)."""
    found = dict(os.environ)
    for name, value in _before.items():
        if value is None:
            found.pop(name, None)
        else:
            found[name] = value
    return found
