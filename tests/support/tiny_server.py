"""`python -m tests.support.tiny_server PORT LIVE [SETTING=NUMBER ...]`: `streamchat serve` on a tiny model.

Prints "ready" on stderr when it serves.
"""

from __future__ import annotations

import sys
from typing import Any

from streamchat.models.light.libraries import import_libraries


def main(port: str, live: str, *settings: str) -> int:
    """Serve until a signal; return the exit code."""
    import_libraries("llama")  # as the product does: what is imported below would import all of transformers
    from streamchat.config.loader import Configuration
    from streamchat.config.settings import Settings
    from streamchat.server.options import Options
    from streamchat.server.run import ApiServer
    from streamchat.store.store import Store
    from tests.support.api_server import SMALL
    from tests.support.real_engine import tiny_loaded

    given: dict[str, Any] = {name: int(value) for name, _, value in (each.partition("=") for each in settings)}
    configuration = Configuration(Settings(**(SMALL | given)), {})
    server = ApiServer(
        configuration, Options(port=int(port), live=int(live)), open_store=Store, load=lambda *_: tiny_loaded()
    )
    server.load()
    print("ready", file=sys.stderr, flush=True)
    return 0 if server.run() else 1


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
