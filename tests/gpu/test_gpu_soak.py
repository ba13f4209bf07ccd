"""A chat of many turns on a GPU: host memory and VRAM stay, whatever the lengths of its messages."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from streamchat.base.errors import TurnError
from streamchat.config.loader import Configuration
from streamchat.config.settings import Settings
from streamchat.conversation.assemble import assemble
from streamchat.conversation.conversation import Conversation
from streamchat.models.load import load_model
from streamchat.replay.invariants import MEMORY_GROWTH, MEMORY_GROWTH_BYTES, MEMORY_WINDOW
from streamchat.replay.trend import Trend, trend
from streamchat.telemetry.memory import memory_state
from tests.support.gpus import TestedGpu, stand_in
from tests.support.models_help import save, tiny_llama

TURN_COUNTS = {True: (100, 160), False: (15, 40)}
"""Turns before and during the measurement, on a GPU and on the stand-in."""
LEAK = 3_600_000
"""Bytes of host memory per turn that plans of cuDNN took."""


def a_chat(folder: Path, gpu: TestedGpu) -> Conversation:
    """A chat on the captured steps of a tiny model."""
    save(tiny_llama(max_position_embeddings=4096), folder)
    loaded = load_model(str(folder), device=gpu.place, dtype="float32")
    if not gpu.is_real:
        gpu.install(loaded.model)
    settings = Settings(temperature=0, cache_size=1024, max_new_tokens=6)
    with torch.inference_mode():
        configuration = Configuration(settings, {"cache_size": "test"})
        return assemble(configuration, loaded, lambda _: None, lambda *_: None).conversation


def growth(chat: Conversation, gpu: TestedGpu, after_turn: Callable[[], int] = lambda: 0) -> tuple[Trend, Trend]:
    """Host memory and VRAM over the turns after the first ones; messages of ever new lengths.

    `after_turn` returns bytes to add to the host's.
    """
    lengths = random.Random(5)
    warm_up, turns = TURN_COUNTS[gpu.is_real]
    host, device = list[float](), list[float]()
    for turn in range(warm_up + turns):
        chat.run_turn("word " * lengths.randrange(1, 150), lambda: False)
        chat.record_steps()
        memory, more = memory_state(gpu.place), after_turn()
        if turn >= warm_up:
            host.append(memory.rss_bytes + more)
            device.append(memory.allocated_bytes or 0)
    found = trend(host), trend(device)
    assert found[0] is not None
    assert found[1] is not None
    return found[0], found[1]


def bound(found: Trend) -> float:
    """The limit of `replay`, for as many turns: the same slope."""
    return max(MEMORY_GROWTH_BYTES, MEMORY_GROWTH * found.median) * found.count / MEMORY_WINDOW


def test_host_memory_and_vram_stay_over_turns_of_all_lengths(tmp_path: Path, gpu: TestedGpu) -> None:
    chat = a_chat(tmp_path / "tiny", gpu)
    host, device = growth(chat, gpu)
    assert chat.cache.compression_count > 1
    assert not host.grows(bound(host)), host
    assert not device.grows(bound(device)), device


def test_plans_that_are_kept_for_every_length_would_be_seen(tmp_path: Path) -> None:
    gpu = stand_in()
    leaked = iter(range(0, 10**9, LEAK))
    host, _ = growth(a_chat(tmp_path / "tiny", gpu), gpu, lambda: next(leaked))
    assert host.grows(bound(host))


@pytest.mark.parametrize("layer", [0, 1])
def test_a_turn_whose_values_were_not_finite_does_not_harm_later_ones(
    layer: int, tmp_path: Path, gpu: TestedGpu
) -> None:
    """The steps read free slots with a weight of 0, and 0 times NaN is NaN."""
    chat = a_chat(tmp_path / "tiny", gpu)
    for _ in range(3):
        chat.run_turn("word " * 9, lambda: False)
        chat.record_steps()
    weight = chat.model.model.layers[layer].self_attn.v_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    with pytest.raises(TurnError, match="NaN"):
        chat.run_turn("word " * 40, lambda: False)
    with torch.no_grad():
        weight.copy_(before)
    assert chat.run_turn("word " * 9, lambda: False).finish_reason in ("stop", "length")
    assert chat.model.forward.step.failed == ""
