"""On a GPU: the same words as on the CPU, memory that stays, and two GPUs that are one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from streamchat.cache import checkpoint
from streamchat.cache.arguments import cache_keyword
from streamchat.cache.hook import StreamingHook
from streamchat.cache.positions.strategy import choose_fit, make_cache
from streamchat.cache.streaming import StreamingCache
from streamchat.conversation.feeder import Feeder
from streamchat.conversation.log import TokenLog
from streamchat.models.load import load_model
from streamchat.telemetry.memory import memory_state, peak_memory
from tests.support.gpus import TestedGpu
from tests.support.models_help import save, tiny_llama
from tests.support.small_chat import replies
from tests.support.tiny import kv_of, random_ids, tiny_model

SEVERAL = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs, and torch finds fewer here")


def small_cache(model: object) -> StreamingCache:
    """Full after 48 tokens; positions are moved back at 100."""
    cache = make_cache(model, choose_fit(model), cache_size=48, num_sink_tokens=4)
    cache.position_limit = min(cache.position_limit, 100)
    return cache


def greedy(family: str, place: str, count: int) -> tuple[list[int], StreamingCache]:
    """Ids after a prompt of 20, of a tiny random model; and its cache."""
    model = tiny_model(family).to(place)
    cache = small_cache(model)
    feeder = Feeder(model, cache, TokenLog())
    written = []
    with StreamingHook(model, cache):
        logits = feeder.feed(random_ids(20)[0].tolist())
        for _ in range(count):
            written.append(int(logits.argmax()))
            logits = feeder.forward(written[-1:])
    return written, cache


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_a_gpu_writes_what_the_cpu_writes(family: str, gpu: TestedGpu) -> None:
    ours, cache = greedy(family, gpu.place, 250)
    expected, theirs = greedy(family, "cpu", 250)
    assert cache.compression_count == theirs.compression_count > 5
    assert {device.type for device in cache.fit.devices} == {torch.device(gpu.place).type}
    assert ours == expected
    assert len(set(ours)) > 5


def test_memory_of_the_gpu_stays_over_thousands_of_tokens(gpu: TestedGpu) -> None:
    model = tiny_model("llama").to(gpu.place)
    cache = make_cache(model, choose_fit(model), cache_size=128, num_sink_tokens=4)
    cache.position_limit = 300  # positions are moved back before the first look, too
    feeder = Feeder(model, cache, TokenLog())
    held = {}
    with StreamingHook(model, cache), peak_memory(gpu.place) as peak:
        for turn in range(1, 41):
            feeder.feed(random_ids(60, seed=turn)[0].tolist())
            for token in random_ids(60, seed=turn + 100)[0].tolist():
                feeder.forward([token])
            memory = memory_state(gpu.place)
            held[120 * turn] = memory.allocated_bytes or 0, memory.reserved_bytes or 0, peak() or 0
    assert cache.ledger.next_index == 4800
    # a cache that grew would need 768 bytes more for each token: 3.2 MB
    grown = [late - early for early, late in zip(held[600], held[4800], strict=True)]
    allocated, reserved, most = grown
    assert allocated <= 64_000
    assert most <= 64_000
    assert reserved <= 2 << 20  # a segment of torch's allocator


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_checkpoint_comes_back_to_the_gpu_with_the_same_logits(family: str, gpu: TestedGpu) -> None:
    model = tiny_model(family).to(gpu.place)
    first, again = small_cache(model), small_cache(model)

    def logits(cache: StreamingCache, ids: torch.Tensor) -> torch.Tensor:
        with StreamingHook(model, cache), torch.inference_mode():
            found = [
                model(input_ids=each.to(gpu.place), use_cache=True, **{cache_keyword(model): cache}).logits[0, -1]
                for each in torch.split(ids, 1, dim=1)
            ]
        return torch.stack(found)

    logits(first, random_ids(90))
    checkpoint.restore(again, checkpoint.capture(first))
    for cache in (first, again):
        assert {kv_of(layer)[0].device.type for layer in cache.streaming_layers} == {gpu.place}
    assert torch.equal(logits(again, random_ids(60, seed=2)), logits(first, random_ids(60, seed=2)))


def test_a_chat_on_a_gpu_says_what_it_says_on_the_cpu(tmp_path: Path, gpu: TestedGpu) -> None:
    folder = save(tiny_llama(max_position_embeddings=2048), tmp_path / "tiny")
    ours = load_model(str(folder), device=gpu.place, dtype="float32")
    assert (ours.device, ours.notes) == (gpu.place, ())
    memory = memory_state(ours.device)
    if gpu.is_real:
        assert memory.reserved_bytes is not None
        assert memory.allocated_bytes is not None
        assert memory.reserved_bytes >= memory.allocated_bytes >= 4 * sum(p.numel() for p in ours.model.parameters())
    assert replies(ours) == replies(load_model(str(folder), device="cpu", dtype="float32"))


@pytest.mark.gpu
@SEVERAL
def test_two_gpus_say_what_one_says(tmp_path: Path) -> None:
    folder = save(tiny_llama(max_position_embeddings=2048, num_hidden_layers=6), tmp_path / "tiny")
    both = load_model(str(folder), device="cuda:0,1", dtype="float32")
    assert both.device == "cuda:0,1"
    assert {parameter.device.index for parameter in both.model.parameters()} == {0, 1}
    assert both.notes == ()
    assert replies(both) == replies(load_model(str(folder), device="cuda:1", dtype="float32"))
