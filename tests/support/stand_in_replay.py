"""The processes of `streamchat replay --chaos` on the stand-in for a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streamchat.cli import main as cli
from streamchat.decode.install import install_captured
from streamchat.models import checked_step
from tests.support.forked_process import ForkedProcess
from tests.support.recorded_graphs import RecordedGraphs


def start(command: Sequence[str], **options: Any) -> ForkedProcess:
    """Start a process whose command line is the arguments of `streamchat`, in place of `subprocess.Popen`."""
    return ForkedProcess(_main, command, **options)


def _main(arguments: list[str]) -> int:
    """Capture the steps of every loaded model as on CUDA, with recorded operations, and run the command."""
    setattr(checked_step, "install", _install)  # noqa: B010 - for mypy
    return int(cli.main(arguments))


def _install(model: Any, kernels: Any, decode: Any = "auto") -> bool:
    del kernels
    if not install_captured(model, RecordedGraphs().record, decode):
        raise AssertionError("the model has no captured step")
    return False  # the captured step checks itself
