"""`streamchat acp` on a tiny random model, for tests of its protocol: python tests/support/acp_face.py [FLAGS ...]

It prints to stdout while it loads, as a library might.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script, from any folder

from streamchat.cli import main as cli
from streamchat.models.light.libraries import import_libraries
from streamchat.scripting import chat


def load(*_: Any) -> Any:
    """A tiny model; with ENDLESS in the environment and temperature 0 it does not end a reply by itself."""
    import_libraries("llama")  # as the product does: what is imported below would import all of transformers
    from tests.support.real_engine import tiny_loaded

    print("a library prints")
    os.write(1, b"and writes to the descriptor\n")
    loaded = tiny_loaded()
    if os.environ.get("ENDLESS"):
        for special in loaded.tokenizer.all_special_ids:  # never the most likely one
            loaded.model.lm_head.weight.data[special] = 0
    return loaded


if __name__ == "__main__":
    vars(chat)["load_from_settings"] = load
    raise SystemExit(cli.main(["acp", *sys.argv[1:]]))
