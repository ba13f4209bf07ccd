"""`python -P -m streamchat.cli.in_folder FOLDER ARGUMENT...`: run streamchat in FOLDER.

Python starts in another folder, so that neither Python nor the library loader picks up files from FOLDER.
"""

import os
import sys

from streamchat.__main__ import main

if __name__ == "__main__":
    os.chdir(sys.argv[1])
    raise SystemExit(main(sys.argv[2:]))
