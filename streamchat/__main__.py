"""Entry point of `python -m streamchat` and the console script.

Before any other import, the current folder is removed from Python's module path: a `json.py` in a download folder must
not replace the standard module.
"""

import os
import sys

from streamchat.base.search_path import protect

protect(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from streamchat.base.out_of_memory import OUT_OF_MEMORY, is_out_of_memory  # noqa: E402 - after `protect`

TYPE_CHECKING = False  # typing's own is not imported: memory may be short
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

LEAST_BYTES = 64_000_000
"""Address space that Python and the modules of the command line need. With less, imports fail in any way."""
_SENTENCE = f"streamchat: {OUT_OF_MEMORY}\n".encode()
_EXIT_CODE = 3


def main(argv: "Sequence[str] | None" = None) -> int:
    """Run streamchat and return the exit code."""
    try:
        return _main(argv)
    except MemoryError:  # also while another error was to be reported
        _exit_without_memory()


def _exit_without_memory() -> "NoReturn":
    """Say that memory ran out, and exit at once: Python needs memory to end the process in good order."""
    try:
        os.write(2, _SENTENCE)
    finally:
        os._exit(_EXIT_CODE)


def _address_space() -> float:
    """Return the bytes of address space that the shell allows; infinity without a limit."""
    try:
        import resource
    except ModuleNotFoundError:  # on Windows
        return float("inf")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return float("inf") if limit == resource.RLIM_INFINITY else limit


try:
    if _address_space() < LEAST_BYTES:
        raise MemoryError
    from streamchat.cli.main import main as _main
except (MemoryError, ImportError, OSError, SystemError) as error:
    if is_out_of_memory(error):
        _exit_without_memory()
    from streamchat.base.errors import limit_reached

    limit = limit_reached(error)
    if limit is None:
        raise
    sys.stderr.write(f"streamchat: {limit}\n")
    raise SystemExit(limit.exit_code) from None

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
