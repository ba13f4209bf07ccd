"""The step that a GPU replays: run on a CPU, operation by operation, against the forward of transformers."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from streamchat.cache import checkpoint
from streamchat.cache.arguments import cache_keyword
from streamchat.cache.hook import StreamingHook
from streamchat.cache.streaming import StreamingCache
from streamchat.decode import cuda_graph as capturing
from streamchat.decode import install as decode_install
from streamchat.decode.cuda_graph import STEADY
from streamchat.decode.install import install, install_captured, uninstall
from streamchat.decode.static import static_step
from tests.support.decode_models import GROUPED, KNOWN, cache_of, counted, make, stream
from tests.support.families import build, text
from tests.support.recorded_graphs import RecordedGraphs
from tests.support.tiny import kv_of


def feed(model: Any, cache: StreamingCache, ids: Tensor) -> Tensor:
    """(tokens, vocabulary) logits, one token at a time."""
    return stream(model, cache, ids, 1)


def assert_same(ours: StreamingCache, theirs: StreamingCache) -> None:
    assert ours.lengths == theirs.lengths
    assert ours.ledger == theirs.ledger
    for mine, other in zip(ours.streaming_layers, theirs.streaming_layers, strict=True):
        assert mine.next_position == other.next_position
        torch.testing.assert_close(mine.keys, other.keys, rtol=0, atol=1e-4)
        torch.testing.assert_close(mine.values, other.values, rtol=0, atol=1e-4)


class Pair:
    """The same model and cache twice: one with replayed steps, one with the plain forward only."""

    def __init__(self, name: str, size: int = 64) -> None:
        self.plain, self.model = make(name), make(name)
        self.graphs = RecordedGraphs()
        assert install_captured(self.model, self.graphs.record)
        self.expected, self.cache = cache_of(self.plain, size), cache_of(self.model, size)

    def read(self, ids: Tensor, prompt: int) -> None:
        """Feed both, and compare logits and caches."""
        found, expected = stream(self.model, self.cache, ids, prompt), stream(self.plain, self.expected, ids, prompt)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert_same(self.cache, self.expected)

    def both(self, do: Callable[[StreamingCache], object]) -> None:
        """Change both caches in the same way."""
        for cache in (self.expected, self.cache):
            do(cache)


@pytest.mark.slow
@pytest.mark.smoke
@pytest.mark.parametrize("name", KNOWN)
def test_logits_and_cache_are_those_of_the_plain_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(name)
    uninstall(pair.model)
    seen = counted(pair.model, monkeypatch)
    install_captured(pair.model, pair.graphs.record)
    pair.read(text(150), 40)
    assert pair.cache.compression_count > 50
    assert seen == [40, 1]  # the prompt, and the token by which the step was checked
    assert pair.graphs.recordings == 1
    assert pair.graphs.replays == 1 + 150 - 40 - STEADY + 1  # one more by which the recording was checked


def test_the_live_part_moves_through_the_buffers_and_is_cut_cleared_and_loaded() -> None:
    pair = Pair("llama", 48)
    pair.both(lambda cache: setattr(cache, "position_limit", 100))  # positions go back to 0 after 52 tokens or so
    pair.read(text(100), 30)
    starts = {layer.start for layer in pair.cache.streaming_layers}
    assert len(starts) == 1
    pair.both(lambda cache: cache.crop_newest(7))
    pair.read(text(20, seed=6), 1)
    kept = checkpoint.capture(pair.cache), checkpoint.capture(pair.expected)
    pair.both(lambda cache: cache.pin(80, 90))
    pair.read(text(60, seed=7), 12)
    pair.both(lambda cache: cache.reset())
    pair.read(text(30, seed=8), 4)
    checkpoint.restore(pair.cache, kept[0])
    checkpoint.restore(pair.expected, kept[1])
    pair.read(text(90, seed=9), 1)
    assert pair.expected.next_position < 200  # it was rebased, more than once
    assert pair.graphs.recordings == 1
    assert pair.graphs.replays > 200


def test_layers_that_a_failed_forward_left_apart_are_brought_together(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair("llama", 16)
    slots = pair.cache.streaming_layers[0].slots
    pair.read(text(slots - 1), 4)  # the next two tokens do not fit behind the live part, which is moved
    assert {layer.end for layer in pair.cache.streaming_layers} == {slots - 1}
    broken: Any = pair.cache.layers[2]
    with monkeypatch.context() as patch:

        def fail(*args: Any, **kwargs: Any) -> Any:
            raise MemoryError

        patch.setattr(broken, "update", fail)
        with torch.inference_mode(), StreamingHook(pair.model, pair.cache), pytest.raises(MemoryError):
            # two tokens: not a step
            pair.model(input_ids=text(2), use_cache=True, **{cache_keyword(pair.model): pair.cache})
    pair.cache.discard_partial_forward()
    assert len({layer.start for layer in pair.cache.streaming_layers}) == 2
    with torch.inference_mode():
        pair.expected.make_room(2)
    replays = pair.graphs.replays
    pair.read(text(40, seed=6), 1)
    assert pair.graphs.replays == replays + 40
    assert len({layer.start for layer in pair.cache.streaming_layers}) == 1


def test_another_cache_gets_a_recording_of_its_own_after_some_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair("llama", 32)
    pair.read(text(30), 10)
    assert pair.graphs.recordings == 1
    twin = copy.deepcopy(pair.cache)
    feed(pair.model, twin, text(STEADY - 1, seed=6))
    assert pair.graphs.recordings == 1
    feed(pair.model, twin, text(1, seed=7))
    assert pair.graphs.recordings == 2
    # turn by turn nothing is recorded, and all is right
    for i in range(2 * STEADY):
        feed(pair.model, twin, text(1, seed=i))
        pair.read(text(1, seed=i), 1)
    assert pair.graphs.recordings == 2


def test_buffers_of_another_batch_are_recorded_anew() -> None:
    pair = Pair("llama", 32)
    pair.read(text(30), 10)
    pair.both(lambda cache: cache.reorder_cache(torch.tensor([0])))
    pair.read(text(30, seed=6), 1)
    assert pair.graphs.recordings == 2


def test_a_cache_that_is_gone_is_not_kept_alive() -> None:
    pair = Pair("llama", 32)
    stream(pair.model, pair.cache, text(10 + STEADY - 1), 10)  # a recording on a CPU would keep it
    buffers = pair.cache.streaming_layers[0].buffers
    assert buffers is not None
    held = weakref.ref(buffers[0])
    pair.cache = pair.expected
    del buffers
    gc.collect()
    assert held() is None


def test_a_conversation_goes_on_to_the_bit_the_same_in_another_process() -> None:
    model = make("llama").to(torch.bfloat16)
    ids = text(130)
    plain = stream(model, cache_of(model, 48), ids, 40)
    install_captured(model, RecordedGraphs().record)
    whole = cache_of(model, 48)
    expected = stream(model, whole, ids, 40)
    assert not torch.equal(expected, plain)
    cache = cache_of(model, 48)
    found = [stream(model, cache, ids[:, :70], 40)]
    kept = checkpoint.capture(cache)
    uninstall(model)  # the other process starts from nothing
    graphs = RecordedGraphs()
    install_captured(model, graphs.record)
    cache = cache_of(model, 48)
    checkpoint.restore(cache, kept)
    found.append(stream(model, cache, ids[:, 70:], 1))
    assert torch.equal(torch.cat(found), expected)
    assert graphs.replays == 1 + 60 - STEADY + 1
    for ours, theirs in zip(cache.streaming_layers, whole.streaming_layers, strict=True):
        for held, expected_held in zip(kv_of(ours), kv_of(theirs), strict=True):
            assert torch.equal(held, expected_held)


class Faulty(RecordedGraphs):
    """Goes wrong in one way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        if self.how == "refuses":
            raise torch.OutOfMemoryError("no room for a graph")
        replay = super().record(run)
        first = replay().clone()

        def wrong() -> Tensor:
            match self.how:
                case "repeats what it recorded":
                    return first
                case "stops working" if self.replays > 20:
                    raise RuntimeError("the device was lost")
                case "is not finite":
                    return replay() * float("nan")
                case _:
                    return replay()

        return wrong


@pytest.mark.parametrize("how", ["refuses", "repeats what it recorded", "is not finite", "stops working"])
def test_whatever_goes_wrong_is_said_once_and_the_plain_forward_goes_on(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    pair = Pair("llama", 32)
    uninstall(pair.model)
    pair.graphs = Faulty(how)
    install_captured(pair.model, pair.graphs.record)
    with caplog.at_level(logging.WARNING):
        pair.read(text(120), 10)
    said = [record.getMessage() for record in caplog.records if "captured step" in record.getMessage()]
    assert len(said) == 1
    expected = {"refuses": "no room for a graph", "stops working": "the device was lost"}
    assert expected.get(how, "standard deviations from those of the step") in said[0]
    assert pair.graphs.recordings <= 1


@pytest.mark.parametrize("wrong", ["position", "nan", "error", "second error"])
def test_a_step_that_is_wrong_on_this_device_is_never_used(
    wrong: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair("llama", 32)
    uninstall(pair.model)
    right = static_step(pair.model)
    assert right is not None
    calls: list[int] = []

    def step(ids: Tensor, positions: Tensor, layers: Any) -> Tensor:
        calls.append(1)
        if wrong == "error" or (wrong == "second error" and len(calls) == 2):
            raise NotImplementedError("no such kernel")
        return right(ids, positions + (wrong == "position"), layers) * (float("nan") if wrong == "nan" else 1)

    monkeypatch.setattr(decode_install, "static_step", lambda _: step)
    install_captured(pair.model, pair.graphs.record)
    with caplog.at_level(logging.WARNING):
        pair.read(text(40), 10)
    said = [record.getMessage() for record in caplog.records if "captured step" in record.getMessage()]
    assert len(said) == 1
    assert ("no such kernel" if "error" in wrong else "from those of the plain forward") in said[0]
    assert pair.graphs.recordings == 0


def test_a_value_read_back_while_recording_is_an_error_as_on_a_gpu() -> None:
    with pytest.raises(RuntimeError, match="read back"):
        RecordedGraphs().record(lambda: torch.zeros(1) * torch.ones(1).item())


def test_a_plain_forward_that_fails_in_the_check_leaves_it_to_the_next_token(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair("llama", 32)
    ids = text(11)
    pair.read(ids[:, :-1], 10)
    layer: Any = pair.cache.layers[1]

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(layer, "update", fail)
        with torch.inference_mode(), StreamingHook(pair.model, pair.cache), pytest.raises(MemoryError):
            pair.model(input_ids=ids[:, -1:], use_cache=True, **{cache_keyword(pair.model): pair.cache})
    pair.read(text(40, seed=6), 1)
    assert pair.graphs.recordings == 1


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_ropes_that_change_with_the_length_are_not_recorded(rope: str) -> None:
    parameters: dict[str, Any] = {"rope_type": rope, "rope_theta": 10000.0, "factor": 2.0}
    if rope == "longrope":
        parameters |= {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "original_max_position_embeddings": 256}
    config = transformers.LlamaConfig(**GROUPED, rope_parameters=parameters)
    model = transformers.LlamaForCausalLM(config)
    model.eval()  # type: ignore[no-untyped-call]
    assert not install_captured(model, RecordedGraphs().record)
    assert not hasattr(model.forward, "step")


def test_a_rope_that_changes_in_one_kind_of_layer_is_not_recorded_either() -> None:
    model = make("llama")
    model.model.rotary_emb.rope_type = {"full_attention": "dynamic", "sliding_attention": "default"}
    assert not install_captured(model, RecordedGraphs().record)


def test_other_families_and_models_on_several_devices_keep_their_forward() -> None:
    assert not install_captured(build("gpt2"), RecordedGraphs().record)
    spread = make("llama")
    spread.model.layers[2].to("meta")
    assert not install(spread, None)
    assert not install(make("llama").to("meta"), None)
    assert "forward" not in spread.__dict__


def test_16_bit_models_are_checked_with_room_for_their_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama").to(torch.bfloat16)
    graphs = RecordedGraphs()
    ids = text(120)
    expected = stream(model, cache_of(model, 48), ids, 20).float()
    install_captured(model, graphs.record)
    found = stream(model, cache_of(model, 48), ids, 20).float()
    assert graphs.replays == 1 + 100 - STEADY + 1
    assert (found - expected).square().mean().sqrt() < 0.05 * expected.std()
    assert capturing.LIMITS[torch.float32] < capturing.ROUNDED_LIMIT
