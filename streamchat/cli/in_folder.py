"""`python -P -m streamchat.cli.in_folder FOLDER ARGUMENT...`: streamchat for a user who is in FOLDER.

Python starts elsewhere, so that neither it nor the loader of libraries finds anything in FOLDER.
"""

import os
import sys

from streamchat.__main__ import main

if __name__ == "__main__":
    os.chdir(sys.argv[1])
    raise SystemExit(main(sys.argv[2:]))
