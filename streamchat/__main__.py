"""Entry point of `python -m streamchat` and the console script.

Before any other import, the current folder is removed from Python's module path: a `json.py` in a download folder must
not replace the standard module.
"""

import os

from streamchat.base.search_path import protect

protect(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from streamchat.cli.main import main  # noqa: E402 - after `protect`

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
