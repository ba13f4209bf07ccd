"""How long the chunks of a prompt are: by device, by the room in the cache, and by the time that they take."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from streamchat.cache.hook import StreamingHook
from streamchat.cache.positions.strategy import choose_fit, make_cache
from streamchat.cache.streaming import StreamingCache
from streamchat.conversation import feeder as feeding
from streamchat.conversation.chunk_size import CUDA_CHUNK, LONGEST_S, SMALLEST, ChunkSize
from streamchat.conversation.feeder import Feeder
from streamchat.conversation.log import TokenLog
from tests.support.tiny import random_ids, tiny_model


def a_cache(size: int = 2048, prompt: int = 0) -> StreamingCache:
    """A cache of that budget with a prompt in it."""
    model = tiny_model("llama")
    cache = make_cache(model, choose_fit(model), cache_size=size, num_sink_tokens=4)
    if prompt:
        with StreamingHook(model, cache):
            Feeder(model, cache, TokenLog()).feed(random_ids(prompt)[0].tolist())
    return cache


@pytest.mark.parametrize(
    ("device", "size", "filled", "prompt", "chunk"),
    [
        ("cpu", 2048, 0, 300, 256),
        ("cpu", 256, 0, 100, 64),  # as ever: a quarter of the room
        ("mps", 2048, 0, 2000, 256),
        ("cuda", 2048, 0, 2000, 1024),
        ("cuda", 2048, 0, 2048, 1024),
        ("cuda", 2048, 8, 2044, 1024),  # next to the sinks
        ("cuda", 2048, 8, 2045, 511),  # above the budget: a quarter of the room
        ("cuda", 256, 0, 100, 1024),  # the whole prompt
        ("cuda", 256, 100, 5000, 63),
    ],
)
def test_chunks_by_device_and_room(device: str, size: int, filled: int, prompt: int, chunk: int) -> None:
    assert ChunkSize(device).of(a_cache(size, filled), prompt, prompt) == chunk


def test_the_rest_of_a_prompt_that_fits_as_it_is_needs_no_small_chunks() -> None:
    cache = a_cache(2048, 8)
    assert ChunkSize("cuda").of(cache, 2045, 2040) == 1024
    assert ChunkSize("cuda").of(cache, 2045, 2041) == 511


def settled(seconds_of: dict[int, float]) -> tuple[int, int]:
    """The chunk size of a GPU on which chunks of these sizes take so long; and how many were timed."""
    size, timed = ChunkSize("cuda"), 0
    while size.is_measured(size.largest):
        size.note(10.0 if timed % 2 == 0 else seconds_of[size.largest])  # the first of two also loads kernels
        timed += 1
    return size.largest, timed


@pytest.mark.parametrize(
    ("seconds_of", "chunk"),
    [
        ({1024: 0.037}, 1024),
        ({1024: LONGEST_S}, 1024),
        ({1024: 0.18, 512: 0.09, 256: 0.046}, 256),
        ({1024: 2.0, 512: 1.0, 256: 0.5, 128: 0.25}, SMALLEST),
        ({1024: 0.060, 512: 0.058}, 1024),  # limited by launches: smaller ones take as long
        ({1024: 0.180, 512: 0.090, 256: 0.080}, 512),
    ],
)
def test_a_slower_gpu_gets_chunks_after_which_a_stop_is_felt_at_once(seconds_of: dict[int, float], chunk: int) -> None:
    found, timed = settled(seconds_of)
    assert found == chunk
    assert timed == 2 * len(seconds_of)


def test_a_cpu_is_not_measured() -> None:
    assert not ChunkSize("cpu").is_measured(256)


def test_each_chunk_of_a_prompt_on_a_gpu_is_waited_for_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    cache = make_cache(model, choose_fit(model), cache_size=8192, num_sink_tokens=4)
    feeder = Feeder(model, cache, TokenLog())
    feeder.chunk_size = ChunkSize("cuda")
    done: list[int] = []
    waited: list[int] = []
    clock = iter([0, 0.2, 1, 1.2])  # of the first two chunks: later ones are not timed
    monkeypatch.setattr(feeding, "time", SimpleNamespace(perf_counter=lambda: next(clock, 0.0)))
    monkeypatch.setattr(feeder, "_wait_for_device", lambda: waited.append(cache.length))
    ids = random_ids(2 * CUDA_CHUNK + 600)[0].tolist()
    with StreamingHook(model, cache), torch.inference_mode():
        feeder.feed(ids, done.append)
    assert done == [0, 1024, 2048, 2560, 2648]
    assert waited == [1024, 2048, 2560, 2648]
    assert cache.length == len(ids)
