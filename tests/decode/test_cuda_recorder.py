"""What `CudaRecorder` asks of CUDA, against a stand-in with the rules of PyTorch's streams, pools and captures."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from streamchat.decode.cuda_graph import WARM_UPS, CudaRecorder


class Stream:
    """A stream of the device that is current when it is made."""

    def __init__(self, device: int) -> None:
        self.device = device

    def wait_stream(self, other: Stream) -> None:
        """Nothing runs at the same time here."""


class Graph:
    """Keeps its pool in use until it is gone."""

    def replay(self) -> None:
        """The operations are those of the recording."""


class Cuda:
    """Two devices. As in PyTorch, a pool is dead after its last graph, and a capture that fails keeps its stream."""

    def __init__(self) -> None:
        self.device = 0
        self.stream = Stream(0)
        self.streams: list[Stream] = []
        self.used: list[Stream] = []
        """The current stream of each run."""
        self.pools: dict[int, weakref.WeakSet[Graph]] = {}
        self.stuck: set[int] = set()
        self.default: Stream | None = None
        self.cached = 500
        """Bytes that torch holds without using them."""
        self.taken = 0

    def make_stream(self) -> Stream:
        self.streams.append(Stream(self.device))
        return self.streams[-1]

    def make_pool(self) -> int:
        return len(self.pools) + len(self.stuck) + 1

    def set_stream(self, stream: Stream) -> None:
        self.stream, self.device = stream, stream.device

    def empty_cache(self) -> None:
        self.cached = 0

    @contextlib.contextmanager
    def on_device(self, device: torch.device) -> Iterator[None]:
        before = self.device, self.stream
        self.device = device.index
        if self.stream.device != device.index:
            self.stream = Stream(device.index)
        yield
        self.device, self.stream = before

    @contextlib.contextmanager
    def on_stream(self, stream: Stream) -> Iterator[None]:
        before = self.stream
        self.set_stream(stream)
        yield
        self.set_stream(before)

    @contextlib.contextmanager
    def graph(
        self, graph: Graph, pool: int, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        self.default = self.default or Stream(self.device)
        self.empty_cache()
        before = self.stream
        self.set_stream(stream or self.default)
        if pool in self.stuck:
            raise RuntimeError("already recording to mempool_id")
        if pool in self.pools and not self.pools[pool]:
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
        self.pools.setdefault(pool, weakref.WeakSet()).add(graph)
        try:
            yield
        except RuntimeError:
            self.stuck.add(pool)
            raise
        self.taken += 100
        self.set_stream(before)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    found = Cuda()
    parts: dict[str, Any] = {
        "device": found.on_device,
        "Stream": found.make_stream,
        "current_stream": lambda: found.stream,
        "set_stream": found.set_stream,
        "stream": found.on_stream,
        "synchronize": lambda: None,
        "empty_cache": found.empty_cache,
        "memory_reserved": lambda: found.cached + found.taken,
        "graph_pool_handle": found.make_pool,
        "CUDAGraph": Graph,
        "graph": found.graph,
    }
    for name, part in parts.items():
        monkeypatch.setattr(torch.cuda, name, part)
    return found


def run_on(cuda: Cuda) -> Callable[[], Tensor]:
    def run() -> Tensor:
        cuda.used.append(cuda.stream)
        return torch.ones(1)

    return run


def test_graphs_share_a_pool_and_a_pool_without_graphs_is_not_used_again(cuda: Cuda) -> None:
    record = CudaRecorder(torch.device("cuda:0"))
    first, second = record(run_on(cuda)), record(run_on(cuda))
    assert len(cuda.pools) == 1
    del first
    third = record(run_on(cuda))
    assert len(cuda.pools) == 1
    del second, third
    assert torch.equal(record(run_on(cuda))(), torch.ones(1))
    assert len(cuda.pools) == 2


def test_all_work_of_recordings_is_on_one_stream_of_the_device(cuda: Cuda) -> None:
    kept = [CudaRecorder(torch.device("cuda:0"))(run_on(cuda))]
    cuda.used.clear()
    record = CudaRecorder(torch.device("cuda:1"))
    kept += [record(run_on(cuda)) for _ in range(3)]
    assert len(cuda.used) == 3 * (WARM_UPS + 1)
    assert len(set(cuda.used)) == 1
    assert cuda.used[0].device == 1
    assert len(cuda.streams) == 2  # one for each recorder
    assert cuda.stream.device == 0


def test_after_a_recording_that_failed_the_stream_is_back_and_others_can_be_recorded(cuda: Cuda) -> None:
    record, before, calls = CudaRecorder(torch.device("cuda:0")), cuda.stream, list[int]()
    kept = record(run_on(cuda))

    def broken() -> Tensor:
        calls.append(1)
        if len(calls) > WARM_UPS:
            raise RuntimeError("operation not permitted when stream is capturing")
        return torch.ones(1)

    with pytest.raises(RuntimeError, match="not permitted"):
        record(broken)
    assert cuda.stream is before
    assert torch.equal(record(run_on(cuda))(), kept())
    assert cuda.stream is before


def test_the_memory_of_a_recording_does_not_count_what_torch_gave_back(
    cuda: Cuda, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        CudaRecorder(torch.device("cuda:0"))(run_on(cuda))
    assert "a captured step took 100 bytes" in caplog.text
