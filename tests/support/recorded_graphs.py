"""A stand-in for CUDA graphs on a CPU, as strict as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Operation = tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]


class RecordedGraphs:
    """Records the operations of a run, and replays these: same operations, same addresses, same numbers of Python.

    As with CUDA, no Python of the run takes part in a replay, each result is written over the one of the recording,
    and a value that is read back while recording is an error.
    """

    def __init__(self) -> None:
        self.recordings = 0
        self.replays = 0
        self._recorder: _Recorder | None = None

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """See `streamchat.decode.cuda_graph.Record`."""
        recorder = self._recorder = _Recorder()
        with recorder:
            result = run()
        self.recordings, self._recorder = self.recordings + 1, None

        def replay() -> Tensor:
            self.replays += 1
            for operation, args, kwargs, results in recorder.operations:
                again = tree_leaves(operation(*args, **kwargs))
                for old, new in zip(results, again, strict=True):
                    # what is a view, or was changed in place, is up to date
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)
            return result

        return replay

    def note(self, operation: Callable[[], tuple[()]]) -> None:
        """Run something that is no operation of torch, and record it if a run is recorded."""
        operation()
        if self._recorder is not None:
            self._recorder.operations.append((operation, (), {}, []))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value is read back from the device while its work is recorded")
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, tree_leaves(result)))
        return result
