"""Short prompts by captured steps of fixed length: padded, masked, and as if the padding had never been there."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from streamchat.cache import checkpoint
from streamchat.cache.arguments import cache_keyword
from streamchat.cache.hook import StreamingHook
from streamchat.cache.streaming import StreamingCache
from streamchat.decode import captured_steps
from streamchat.decode.install import install_captured, record_used, tokens_at_once, uninstall
from streamchat.decode.static_prompt import LENGTHS, prompt_step
from streamchat.models.load import LoadedModel
from tests.support.captured_prompts import assert_same, feed, recorded
from tests.support.decode_models import cache_of, counted, make
from tests.support.families import text
from tests.support.real_engine import running, tiny_loaded
from tests.support.recorded_graphs import RecordedGraphs


def buffers(cache: StreamingCache) -> list[Tensor]:
    """Copies of the whole buffers."""
    return [tensor.clone() for layer in cache.streaming_layers for tensor in layer.buffers or ()]


@pytest.mark.parametrize("count", [2, 15, 16, 17, 100, 128])
def test_padding_and_recording_leave_the_buffers_as_if_they_had_not_been(count: int) -> None:
    model = make("llama")
    cache = cache_of(model, 256)
    with recorded(model, cache) as graphs:
        feed(model, cache, text(60))
        for tensor in (tensor for layer in cache.streaming_layers for tensor in layer.buffers or ()):
            tensor[:, :, 60:] = 7.0  # free
        for seed in range(3):
            before, end, slots = buffers(cache), cache.streaming_layers[0].end, cache.streaming_layers[0].slots
            feed(model, cache, text(count, seed=seed))
            for old, new in zip(before, buffers(cache), strict=True):
                assert torch.equal(old[:, :, :end], new[:, :, :end])
                assert torch.equal(old[:, :, end + count :], new[:, :, end + count :])
                if count < slots:
                    assert not (new[:, :, end : end + count] == 7.0).any()
            before = buffers(cache)
            record_used(model, cache)
            assert all(torch.equal(old, new) for old, new in zip(before, buffers(cache), strict=True))
            cache.crop_newest(count)
            for tensor in (tensor for layer in cache.streaming_layers for tensor in layer.buffers or ()):
                tensor[:, :, 60:] = 7.0
        assert graphs.recordings >= 1
        assert graphs.replays >= 2


def test_what_is_fed_after_a_padded_prompt_sees_nothing_of_it() -> None:
    """Also when the padding reaches the end of the buffers, and the live part moves to the front for it."""
    model, other = make("llama"), make("llama")
    cache, plain = cache_of(model, 64), cache_of(other, 64)
    sizes = [20, 3, 9, 1, 12, 2, 30, 1, 1, 17, 5, 5, 5, 40, 1, 14]
    with recorded(model, cache) as graphs, StreamingHook(other, plain):
        for seed, size in enumerate(sizes):
            ids = text(size, seed=seed)
            torch.testing.assert_close(feed(model, cache, ids), feed(other, plain, ids), rtol=0, atol=1e-4)
            assert_same(cache, plain)
            record_used(model, cache)
            if seed == 8:
                cache.pin(80, 84)
                plain.pin(80, 84)
            if seed == 11:
                cache.crop_newest(7)
                plain.crop_newest(7)
    assert cache.compression_count > 2
    assert graphs.replays > 6


@pytest.mark.parametrize("why", ["all logits", "too long", "no room for padding", "another dtype"])
def test_other_prompts_are_left_to_the_plain_forward(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    cache = cache_of(model, 200)
    count = LENGTHS[-1] + 1 if why == "too long" else 20
    if why == "no room for padding":
        cache = cache_of(model, 64)
        count = 40  # after the first: behind 24 others, 64 do not fit into 80 slots
    if why == "another dtype":
        cache = StreamingCache(model.config, cache.fit, cache_size=200, dtype=torch.bfloat16)
    fed = counted(model, monkeypatch)
    with recorded(model, cache):
        for seed in range(3):
            given: dict[str, Any] = {cache_keyword(model): cache}
            if why != "all logits":
                given["logits_to_keep"] = 1
            with torch.inference_mode():
                logits = model(input_ids=text(count, seed=seed), use_cache=True, **given).logits
            assert logits.shape[1] == (count if why == "all logits" else 1)
            record_used(model, cache)
    assert fed == [count] * 3


def test_drafts_are_not_for_steps_that_give_the_last_logits_only() -> None:
    model = make("llama")
    assert install_captured(model, RecordedGraphs().record)
    assert tokens_at_once(model) == 1


def test_a_conversation_is_bit_for_bit_the_same_whether_its_prompts_were_recorded_or_not() -> None:
    model = make("llama").to(torch.bfloat16)
    prompts = [text(size, seed=size) for size in (30, 12, 25, 9, 40, 28)]

    def run(record: bool) -> tuple[Tensor, checkpoint.CacheCheckpoint]:
        uninstall(model)
        cache = cache_of(model, 200)
        found = []
        with recorded(model, cache) as graphs:
            for ids in prompts:
                found.append(feed(model, cache, ids))
                if record:
                    record_used(model, cache)
        assert graphs.recordings == (3 if record else 0)
        return torch.cat(found), checkpoint.capture(cache)

    (once, one), (again, other) = run(True), run(False)
    assert torch.equal(once, again)
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


class Faulty(RecordedGraphs):
    """Gives other logits than it recorded."""

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        replay = super().record(run)
        return lambda: replay() * -1


@pytest.mark.parametrize("wrong", ["step", "recording", "error"])
def test_a_wrong_prompt_step_is_never_used_and_the_rest_goes_on(
    wrong: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = make("llama"), make("llama")
    cache, plain = cache_of(model, 96), cache_of(other, 96)
    right = prompt_step(model)
    assert right is not None

    def step(*given: Any) -> Tensor:
        if wrong == "error":
            raise NotImplementedError("no such kernel")
        return right(*given) * (-1 if wrong == "step" else 1)

    monkeypatch.setattr(captured_steps, "prompt_step", lambda _: step)
    graphs = Faulty() if wrong == "recording" else RecordedGraphs()
    install_captured(model, graphs.record)
    with caplog.at_level(logging.WARNING), StreamingHook(model, cache), StreamingHook(other, plain):
        for seed in range(4):
            ids = text(20, seed=seed)
            torch.testing.assert_close(feed(model, cache, ids), feed(other, plain, ids), rtol=0, atol=1e-4)
            record_used(model, cache)
            assert_same(cache, plain)
    expected = {
        "step": "from those of the plain forward",
        "recording": "from those of the step",
        "error": "no such kernel",
    }
    [said] = [message for message in caplog.messages if "captured step" in message]
    assert said.startswith("prompts of up to 32 tokens are computed without a captured step: ")
    assert expected[wrong] in said
    assert graphs.recordings == (1 if wrong == "recording" else 0)


def test_a_chat_records_between_turns_what_its_prompts_used() -> None:
    graphs = RecordedGraphs()

    def load(*_: Any) -> LoadedModel:
        loaded = tiny_loaded()
        assert install_captured(loaded.model, graphs.record)
        return loaded

    seen: list[int] = []
    with running(load, max_new_tokens=3, temperature=0) as watched:
        for turn in range(3):
            watched.turn(f"message {turn}")
            seen.append(graphs.recordings)
        said = watched.conversation.log.turns[-1].reply
        steps = watched.conversation.model.forward.step
    assert steps.failed == ""
    assert seen[-1] >= 1
    assert graphs.replays > 0
    with running(max_new_tokens=3, temperature=0) as watched:
        for turn in range(3):
            watched.turn(f"message {turn}")
        assert watched.conversation.log.turns[-1].reply == said
