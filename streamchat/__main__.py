"""Entry point of `python -m streamchat` and the console script.

Before any other import, the current folder is removed from Python's module path: a `json.py` in a download folder must
not replace the standard module.
"""

import os
import sys

from streamchat.base.search_path import protect

protect(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

try:
    from streamchat.cli.main import main
except (MemoryError, ImportError, OSError) as error:
    from streamchat.base.errors import limit_reached

    limit = limit_reached(error)
    if limit is None:
        raise
    sys.stderr.write(f"streamchat: {limit}\n")
    raise SystemExit(limit.exit_code) from None

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
