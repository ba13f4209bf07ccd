"""A stand-in for CUDA graphs on a CPU that also records launches of Triton kernels, which the interpreter runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tests.support.recorded_graphs import RecordedGraphs


class RecordedLaunches(RecordedGraphs):
    """Records operations and launches, and replays these: the same arguments, none of the Python of the run."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """See `streamchat.decode.cuda_graph.Record`."""
        from streamchat.decode.fused.program import Launch

        self.launches = 0

        def recorded(launch: Launch, **changing: Any) -> None:
            kernel, grid, arguments = launch.kernel, launch.grid, launch.arguments | changing

            def repeat() -> tuple[()]:
                with _disable_current_modes():  # the interpreter's own operations are not part of the graph
                    kernel[grid](**arguments)
                return ()

            self.launches += 1
            self.note(repeat)

        with mock.patch.object(Launch, "run", recorded):
            return super().record(run)
