"""`streamchat` on the stand-in for a GPU: `python -m tests.support.stand_in_replay ARGUMENT...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from tests.support.recorded_graphs import RecordedGraphs


def command(arguments: Sequence[str]) -> list[str]:
    """The command line of a process with these arguments, for the supervisor of a run with chaos."""
    return [sys.executable, "-m", "tests.support.stand_in_replay", *arguments]


def main(arguments: list[str]) -> int:
    """Run the command; the supervisor's own process needs no stand-in."""
    from streamchat.cli import main as cli
    from streamchat.commands import replay_chaos

    setattr(replay_chaos, "COMMAND", command)  # noqa: B010 - for mypy
    if "--chaos-link" in arguments:
        _use_recorded_graphs()
    return int(cli.main(arguments))


def _use_recorded_graphs() -> None:
    """Capture the steps of every loaded model as on CUDA, with recorded operations."""
    from streamchat.decode.install import install_captured
    from streamchat.models import checked_step

    def install(model: Any, kernels: Any, decode: Any = "auto") -> bool:
        del kernels
        if not install_captured(model, RecordedGraphs().record, decode):
            raise AssertionError("the model has no captured step")
        return False  # the captured step checks itself

    setattr(checked_step, "install", install)  # noqa: B010


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
