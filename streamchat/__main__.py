"""`python -m streamchat`, and the console script.

Before anything is imported that is not loaded yet, the current folder is taken out of Python's search path: a file
`json.py` in a folder of downloads is not the module that streamchat means.
"""

import os

from streamchat.base.search_path import protect

protect(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from streamchat.cli.main import main  # noqa: E402 - after that

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
