"""A layer of the cache, its slots, and its storage, without a model: what is where after each call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from streamchat.base.errors import CacheError
from streamchat.cache.layers.layer import LayerRotation, StreamingLayer
from streamchat.cache.layers.slots import (
    CopiedStates,
    copied,
    narrowed,
    open_front,
    originals_of,
    read_originals,
    read_slots,
    set_originals,
    states_in,
    write_slots,
)
from streamchat.cache.layers.storage import LayerStorage, NumberStorage, new_storage, states_like
from streamchat.cache.positions.rotation import TensorRotation
from tests.support.bare_cache import HEADS, WIDTH, rotary_source, rotated
from tests.support.tiny import kv_of

CPU = torch.device("cpu")
NOWHERE = torch.device("meta")


def tokens(first: int, stop: int, rows: int = 1) -> tuple[Tensor, Tensor]:
    """Keys that count the tokens, and values that are their negatives."""
    counted = torch.arange(first, stop, dtype=torch.float32)[:, None].expand(rows, HEADS, -1, WIDTH)
    return counted.clone(), -counted


def layer_of(count: int, size: int = 8, rows: int = 1, **options: Any) -> StreamingLayer:
    layer = StreamingLayer(size, LayerRotation(), **options)
    if count:
        layer.update(*tokens(0, count, rows))
    return layer


def cached(layer: StreamingLayer) -> list[int]:
    """The tokens in the layer, read from its keys; the values must agree."""
    keys, values = kv_of(layer)
    assert torch.equal(keys, -values)
    assert (keys == keys[:1, :1, :, :1]).all()
    return [int(each) for each in keys[0, 0, :, 0]]


# --- the layer ------------------------------------------------------------------------------------------------


def test_a_new_layer_has_nothing() -> None:
    layer = layer_of(0)
    assert (layer.keys, layer.values, layer.buffers, layer.stored_dtype) == (None, None, None, None)
    assert (layer.start, layer.end, layer.base, layer.written, layer.num_originals) == (0, 0, 0, 0, 0)
    assert (layer.length, layer.next_position, layer.storage_bytes, layer.token_bytes) == (0, 0, 0, 0)
    assert layer.state() == {}
    assert not layer.is_initialized
    layer.batch_select_indices(torch.tensor([0]))
    assert layer.storage is None


@pytest.mark.parametrize(("size", "slots"), [(1, 17), (64, 80), (67, 83), (68, 85), (100, 125)])
def test_there_are_slots_for_a_quarter_more_or_16(size: int, slots: int) -> None:
    assert StreamingLayer(size, LayerRotation()).slots == slots


def test_the_first_tokens_allocate_the_buffers() -> None:
    layer = layer_of(3)
    assert layer.is_initialized
    assert layer.buffers is not None
    assert [buffer.shape for buffer in layer.buffers] == [(1, HEADS, 24, WIDTH)] * 2
    assert (layer.dtype, layer.stored_dtype, layer.device) == (torch.float32, torch.float32, CPU)
    assert (layer.start, layer.end, layer.length, layer.next_position) == (0, 3, 3, 3)
    assert not any(buffer[:, :, 3:].any() for buffer in layer.buffers)
    assert layer.token_bytes == 2 * HEADS * WIDTH * 4
    assert layer.storage_bytes == 24 * layer.token_bytes
    pair = layer_of(1, dtype=(torch.int8, torch.bfloat16))
    assert (pair.dtype, pair.stored_dtype) == (torch.int8, (torch.int8, torch.bfloat16))
    assert pair.buffers is not None
    assert [buffer.dtype for buffer in pair.buffers] == [torch.int8, torch.bfloat16, torch.bfloat16]
    assert pair.token_bytes == HEADS * (WIDTH + 2 + 2 * WIDTH)


def test_an_update_returns_everything_in_the_dtype_of_the_states() -> None:
    layer = layer_of(3, dtype=torch.bfloat16)
    keys, values = layer.update(*tokens(3, 5))
    assert keys.dtype == values.dtype == torch.float32
    assert keys[0, 0, :, 0].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(values, -keys)
    same, _ = layer_of(0).update(*tokens(0, 2))
    assert same.shape == (1, HEADS, 2, WIDTH)


def test_attributes_of_transformers_cannot_be_replaced() -> None:
    layer = layer_of(3)
    layer.keys = layer.values = None
    assert cached(layer) == [0, 1, 2]
    for name in ("keys", "values"):
        with pytest.raises(CacheError, match="cannot be replaced"):
            setattr(layer, name, torch.ones(1))


def test_more_than_the_budget_is_refused_with_the_values_and_changes_nothing() -> None:
    layer = layer_of(5)
    with pytest.raises(CacheError, match="4 new tokens and 5 cached ones exceed cache_size = 8; run"):
        layer.update(*tokens(5, 9))
    assert cached(layer) == [0, 1, 2, 3, 4]
    layer.update(*tokens(5, 8))
    assert cached(layer) == list(range(8))


def test_another_batch_needs_an_empty_layer() -> None:
    layer = layer_of(2, rows=3)
    with pytest.raises(CacheError, match="a batch of 2 cannot continue a cache with a batch of 3"):
        layer.update(*tokens(2, 3, rows=2))
    assert cached(layer) == [0, 1]
    buffers = layer.buffers
    assert buffers is not None
    layer.reset()
    layer.update(*tokens(0, 1, rows=3))
    assert layer.buffers is not None
    assert layer.buffers[0] is buffers[0]
    layer.reset()
    layer.update(*tokens(0, 1, rows=2))
    assert kv_of(layer)[0].shape[0] == 2


def test_the_used_slots_move_to_the_front_when_the_end_is_reached() -> None:
    layer, starts = layer_of(8), []
    assert layer.slots == 24
    for token in range(8, 40):
        layer.drop_slots(0, 1)
        layer.update(*tokens(token, token + 1))
        assert cached(layer) == list(range(token - 7, token + 1))
        assert (layer.length, layer.base, layer.next_position) == (8, token - 7, token + 1)
        starts.append(layer.start)
    assert starts == [*range(1, 17), *[0] * 1, *range(1, 16)]


def test_slots_are_opened_for_callers_that_write_them() -> None:
    layer = layer_of(6)
    assert layer.open_slot() == 6
    layer.drop_slots(0, 2)
    assert (layer.open_slot(), layer.start) == (6, 2)
    assert (layer.open_slot(18), layer.start) == (6, 2)
    assert (layer.open_slot(19), layer.start, layer.end) == (4, 0, 4)
    assert cached(layer) == [2, 3, 4, 5]
    layer.drop_slots(0, 1)
    assert (layer.open_slot(front=True), layer.start, layer.end) == (3, 0, 3)
    assert cached(layer) == [3, 4, 5]
    assert (layer.open_slot(front=True), layer.open_slot(30)) == (3, 3)  # they are at the front already
    assert (layer.reserve_slots(2), layer.end) == (3, 5)
    assert (layer.reserve_slots(3), layer.end) == (5, 8)


def test_the_last_slot_is_opened_without_a_move() -> None:
    layer = layer_of(8)
    layer.drop_slots(0, 8)
    layer.reserve_slots(8)
    layer.drop_slots(0, 1)
    layer.reserve_slots(1)
    layer.drop_slots(0, 7)
    layer.reserve_slots(6)
    assert (layer.open_slot(), layer.start) == (23, 16)
    assert (layer.open_slot(2), layer.start) == (7, 0)


@pytest.mark.parametrize(("tokens", "left"), [(0, 5), (-1, 4), (-2, 3), (-5, 0), (-9, 0), (9, 5), (2, 2)])
def test_cropping_to_nothing_is_a_negative_number(tokens: int, left: int) -> None:
    layer = layer_of(7)
    layer.drop_slots(0, 2)
    layer.crop(tokens)
    assert cached(layer) == list(range(2, 2 + left)) if left else layer.length == 0


def test_rows_are_picked_from_keys_values_and_originals() -> None:
    rows = torch.arange(3.0)[:, None, None, None]
    layer = StreamingLayer(8, LayerRotation())
    layer.update(rows + tokens(0, 4)[0] * 10, rows - tokens(0, 4)[0] * 10)
    layer.add_originals(rows + tokens(0, 2)[0] * 10, rows - tokens(0, 2)[0] * 10)

    def picked() -> list[int]:
        keys, values = kv_of(layer)
        found = [int(each) for each in keys[:, 0, 0, 0]]
        expected = torch.tensor(found)[:, None, None, None]
        assert torch.equal(keys, expected + tokens(0, 4)[0] * 10)
        assert torch.equal(values, expected - tokens(0, 4)[0] * 10)
        assert torch.equal(layer.originals(0), keys[:, :, :2])
        assert torch.equal(layer.originals(1), values[:, :, :2])
        return found

    layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert picked() == [2, 0, 0]
    layer.batch_repeat_interleave(2)
    assert picked() == [2, 2, 0, 0, 0, 0]
    layer.batch_select_indices(torch.tensor([3, 1]))
    assert picked() == [0, 2]


def test_unrotated_keys_have_the_size_of_the_keys() -> None:
    layer = StreamingLayer(8, LayerRotation(TensorRotation(rotary_source(), 0, False)))
    plain = torch.randn(1, HEADS, 5, WIDTH)
    layer.update(rotated(plain, 0).float(), torch.randn(1, HEADS, 5, 3))
    keys = layer.unrotated_keys(1, 4)
    assert (keys.shape, keys.dtype) == ((1, HEADS, 3, WIDTH), torch.float32)
    torch.testing.assert_close(keys, plain[:, :, 1:4], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("length", "left"), [(9, 5), (5, 5), (3, 3), (1, 1)])
def test_truncating_keeps_the_first_tokens(length: int, left: int) -> None:
    layer = layer_of(7)
    layer.drop_slots(0, 2)
    layer.crop(length)
    assert (cached(layer), layer.base, layer.start) == (list(range(2, 2 + left)), 2, 2)


@pytest.mark.parametrize("length", [0, -1, -5])
def test_truncating_to_nothing_begins_anew(length: int) -> None:
    layer = layer_of(7)
    layer.drop_slots(0, 2)
    layer.add_originals(*tokens(2, 4))
    layer.written = 2
    layer.truncate(length)
    assert (layer.start, layer.end, layer.base, layer.written, layer.num_originals) == (0, 0, 0, 0, 0)


def test_originals_are_those_of_the_first_slots() -> None:
    layer = layer_of(7)
    layer.add_originals(*tokens(0, 2))
    layer.add_originals(*tokens(2, 5))
    layer.written = 4
    assert layer.num_originals == 5
    assert layer.originals(0)[0, 0, :, 0].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(layer.originals(1), -layer.originals(0))
    layer.truncate(5)
    assert (layer.num_originals, layer.written) == (5, 4)
    layer.drop_slots(5, 0)
    layer.drop_slots(1, 2)
    assert layer.originals(0)[0, 0, :, 0].tolist() == [0, 3, 4]
    assert torch.equal(layer.originals(1), -layer.originals(0))
    layer.truncate(2)
    assert layer.originals(0)[0, 0, :, 0].tolist() == [0, 3]
    assert torch.equal(layer.originals(1), -layer.originals(0))
    assert layer.written == 2
    layer.drop_slots(0, 2)
    assert layer.num_originals == 0
    layer = layer_of(4)
    layer.add_originals(*tokens(0, 2))
    layer.drop_slots(0, 2)
    assert layer.state().keys() == {"keys", "values"}
    layer = layer_of(3)
    layer.add_originals(*tokens(0, 2))
    layer.reset()
    assert (layer.num_originals, layer.length) == (0, 0)


def test_the_window_moves_without_the_slots_that_have_originals() -> None:
    turn = TensorRotation(rotary_source(), 0, False)
    for rotation in (LayerRotation(turn, None), LayerRotation(None, turn), LayerRotation(turn, turn)):
        layer = StreamingLayer(8, rotation)
        plain = [torch.randn(1, HEADS, 6, WIDTH) for _ in range(2)]
        both = (rotation.keys, rotation.values)
        layer.update(*(x if each is None else rotated(x, 0).float() for x, each in zip(plain, both, strict=True)))
        layer.add_originals(plain[0][:, :, :2], plain[1][:, :, :2])
        before = [x.clone() for x in kv_of(layer)]
        layer.move_window(30)
        assert layer.base == 30
        for found, old, x, each in zip(kv_of(layer), before, plain, both, strict=True):
            assert torch.equal(found[:, :, :2], old[:, :, :2])  # `write_fronts` writes those
            expected = x if each is None else rotated(x, 30)
            torch.testing.assert_close(found[:, :, 2:].double(), expected[:, :, 2:].double(), atol=1e-5, rtol=0)
        layer.truncate(2)
        layer.move_window(3)  # nothing but slots with originals
        assert layer.base == 3


# --- states ---------------------------------------------------------------------------------------------------


def test_a_state_is_loaded_as_a_copy() -> None:
    saved = layer_of(6)
    saved.drop_slots(0, 2)
    saved.add_originals(*tokens(2, 4))
    state = saved.state()
    assert state.keys() == {"keys", "values", "original_keys", "original_values"}
    assert state["keys"][0, 0, :, 0].tolist() == [2, 3, 4, 5]
    layer = layer_of(0)
    layer.load(state, 2, CPU)
    assert (cached(layer), layer.start, layer.end, layer.base, layer.written) == ([2, 3, 4, 5], 0, 4, 2, 0)
    assert (layer.num_originals, layer.slots, layer.dtype) == (2, 24, torch.float32)
    assert layer.buffers is not None
    assert layer.buffers[0].shape == (1, HEADS, 24, WIDTH)
    for name, tensor in layer.state().items():
        assert torch.equal(tensor, state[name])
        assert tensor.data_ptr() != state[name].data_ptr()
    buffers = layer.buffers
    layer.reset()
    layer.load({name: state[name] for name in ("keys", "values")}, 9, NOWHERE)  # the buffers exist
    assert layer.buffers[0] is buffers[0]
    assert (cached(layer), layer.base, layer.num_originals) == ([2, 3, 4, 5], 9, 0)
    layer.reset()
    layer.load(layer_of(3, rows=2).state(), 0, CPU)
    assert kv_of(layer)[0].shape == (2, HEADS, 3, WIDTH)


def test_a_new_layer_is_loaded_on_the_device_that_is_given() -> None:
    layer = layer_of(0)
    layer.load(layer_of(3).state(), 0, NOWHERE)
    assert layer.storage is not None
    assert layer.storage.device == NOWHERE
    assert {part.device for part in layer.storage.parts} == {NOWHERE}


def test_a_state_without_tokens_loads_nothing() -> None:
    layer = layer_of(0)
    layer.load({}, 5, CPU)
    assert (layer.storage, layer.base, layer.length) == (None, 0, 0)


# --- slots ----------------------------------------------------------------------------------------------------


def test_slots_are_read_as_views_and_written_from_the_first() -> None:
    layer = layer_of(6)
    layer.drop_slots(0, 2)
    state = read_slots(layer, 1, 3)
    assert state["keys"][0, 0, :, 0].tolist() == [3, 4]
    assert torch.equal(state["values"], -state["keys"])
    write_slots(layer, 0, {name: tensor.clone() for name, tensor in state.items()})
    assert cached(layer) == [3, 4, 4, 5]
    write_slots(layer, 0, {})
    write_slots(layer, 2, {"keys": state["keys"].clone()})  # the values stay
    keys, values = kv_of(layer)
    assert keys[0, 0, :, 0].tolist() == [3, 4, 4, 4]
    assert values[0, 0, :, 0].tolist() == [-3, -4, -4, -5]


@pytest.mark.parametrize(("first", "stop", "found"), [(0, 3, [0, 1, 2]), (1, 9, [1, 2]), (2, 3, [2]), (3, 5, None)])
def test_originals_are_read_as_far_as_there_are_some(first: int, stop: int, found: list[int] | None) -> None:
    layer = layer_of(6)
    assert read_originals(layer, 0, 4) == {}
    layer.add_originals(*tokens(0, 3))
    state = read_originals(layer, first, stop)
    assert state.keys() == (set() if found is None else {"original_keys", "original_values"})
    if found is not None:
        keys, values = originals_of(state)
        assert keys[0, 0, :, 0].tolist() == found
        assert torch.equal(values, -keys)


def test_originals_are_replaced_by_the_parts_that_have_some() -> None:
    layer = layer_of(6)
    set_originals(layer, [tokens(0, 2), tokens(2, 2), tokens(4, 5)])
    assert layer.originals(0)[0, 0, :, 0].tolist() == [0, 1, 4]
    assert torch.equal(layer.originals(1), -layer.originals(0))
    set_originals(layer, [tokens(2, 2)])
    assert layer.num_originals == 0
    assert layer.state().keys() == {"keys", "values"}
    set_originals(layer, [tokens(2, 3)])
    set_originals(layer, [])
    assert layer.num_originals == 0
    empty = layer_of(0)
    set_originals(empty, [tokens(2, 3)])
    assert empty.num_originals == 1
    loaded = layer_of(0)
    loaded.load(layer_of(3).state(), 0, NOWHERE)
    set_originals(loaded, [tokens(0, 2)])
    assert loaded.originals(0).device == loaded.originals(1).device == NOWHERE


@pytest.mark.parametrize(("start", "count", "new"), [(2, 1, 2), (2, 2, 2), (2, 3, 3), (0, 18, 18), (5, 20, 20)])
def test_a_front_is_opened_without_a_change_of_the_contents(start: int, count: int, new: int) -> None:
    layer = layer_of(start + 4, size=10)
    layer.drop_slots(0, start)
    open_front(layer, count)
    assert (layer.start, layer.end, cached(layer)) == (new, new + 4, list(range(start, start + 4)))
    empty = layer_of(0)
    open_front(empty, 3)
    assert (empty.start, empty.end) == (0, 0)


def test_states_are_copied_in_stacks_of_equal_shapes() -> None:
    states = [
        {"keys": torch.full((1, 2, 3, width), float(i)), "more": torch.zeros(1, i + 1, 3)}
        for i, width in ((0, 4), (1, 6), (2, 4))
    ]
    found = copied(states)
    assert [(name, layers) for name, layers, _ in found.stacks] == [
        ("keys", (0, 2)), ("more", (0,)), ("keys", (1,)), ("more", (1,)), ("more", (2,))
    ]  # fmt: skip
    assert found.nbytes == 4 * (3 * 2 * (4 + 6 + 4) + 3 * (1 + 2 + 3))
    for i, state in enumerate(states):
        assert found.of(i).keys() == state.keys()
        assert all(torch.equal(found.of(i)[name], tensor) for name, tensor in state.items())
    states[0]["keys"][:] = 9
    assert not found.of(0)["keys"].any()
    assert found
    assert not CopiedStates()
    assert not copied([{}, {}])
    assert (CopiedStates().nbytes, CopiedStates().of(0)) == (0, {})


def test_copies_are_narrowed_to_some_slots() -> None:
    found = narrowed(copied([read_slots(layer_of(6), 0, 6)]), 2, 3)
    assert found.of(0)["keys"][0, 0, :, 0].tolist() == [2, 3, 4]
    assert found.of(0)["values"][0, 0, :, 0].tolist() == [-2, -3, -4]


def test_stacks_of_numbers_are_returned_as_they_are() -> None:
    stacks = copied([read_slots(layer_of(2), 0, 2), read_slots(layer_of(2), 0, 2)])
    assert [(name, layers) for name, layers, _ in states_in(stacks)] == [("keys", (0, 1)), ("values", (0, 1))]
    assert all(a[2] is b[2] for a, b in zip(states_in(stacks), stacks.stacks, strict=True))


# --- storage --------------------------------------------------------------------------------------------------


def test_storage_starts_at_0_and_converts_what_is_written() -> None:
    storage = NumberStorage(torch.ones(2, 3, 1, 4, dtype=torch.float64), 5, torch.bfloat16)
    assert (storage.numbers.shape, storage.dtype, storage.parts[""].any().item()) == (
        (2, 3, 5, 4),
        torch.bfloat16,
        False,
    )
    storage.write(1, torch.full((2, 3, 2, 4), 1.5))
    assert storage.numbers[0, 0, :, 0].tolist() == [0, 1.5, 1.5, 0, 0]
    assert storage.read(2, 2)[1, 2, :, 3].tolist() == [1.5, 0]


@pytest.mark.parametrize(
    ("dtype", "parts"),
    [
        (torch.float32, ["keys", "values"]),
        (torch.int8, ["keys", "key_scales", "values", "value_scales"]),
        ((torch.int8, torch.float32), ["keys", "key_scales", "values"]),
        ((torch.float32, torch.int8), ["keys", "values", "value_scales"]),
    ],
)
def test_raw_slots_have_the_parts_of_their_dtypes(dtype: Any, parts: list[str]) -> None:
    keys, values = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6)
    storage = new_storage(keys, values, 7, dtype)
    storage.write(2, keys, values)
    raw = storage.raw(2, 4)
    assert list(raw) == parts
    assert {part.shape[2] for part in raw.values()} == {4}
    assert (storage.batch, storage.device, len(storage.parts), len(storage.buffers)) == (2, CPU, *[len(parts)] * 2)
    assert [buffer.dim() for buffer in storage.buffers] == [4, 4] + [3] * (len(parts) - 2)
    assert storage.nbytes == 7 * storage.token_bytes
    assert states_like(raw)[0].shape == states_like(raw)[1].shape == (2, 3, 0, 6)
    # raw slots of the same format are copied to the bit, others converted
    for other in (dtype, torch.float32, torch.int8):
        copy = new_storage(keys, values, 5, other)
        assert copy.write_raw(1, {name: part.clone() for name, part in raw.items()}) == 4
        for mine, theirs in zip(copy.both, storage.both, strict=True):
            found, expected = mine.read(1, 4).float(), theirs.read(2, 4).float()
            assert torch.equal(found, expected) if other == dtype else (found - expected).abs().max() < 0.05
            assert not mine.read(0, 1).any()
    storage.select(lambda x: x[1:])
    assert (storage.batch, torch.equal(storage.raw(2, 4)["keys"], raw["keys"][1:])) == (1, True)
    assert torch.equal(storage.raw(2, 4)["values"], raw["values"][1:])


@pytest.mark.parametrize(("start", "count"), [(1, 1), (1, 5), (3, 5), (5, 3), (2, 4), (3, 6)])
def test_slots_move_to_the_front_in_order(start: int, count: int) -> None:
    storage = LayerStorage(*(NumberStorage(torch.ones(1, 1, 1, 2), 10, torch.float32) for _ in range(2)))
    x = torch.arange(10.0)[None, None, :, None].expand(1, 1, 10, 2)
    storage.write(0, x, -x)
    storage.move_to_front(start, count)
    for each, sign in zip(storage.both, (1, -1), strict=True):
        expected = [*range(start, start + count)]
        assert (sign * each.read(0, count))[0, 0, :, 1].tolist() == expected


def test_buffers_of_a_layer_can_be_used_after_inference_mode() -> None:
    with torch.inference_mode():
        layer = layer_of(3)
        layer.add_originals(*tokens(0, 1))
        picks: list[Callable[[], None]] = [
            lambda: layer.reorder_cache(torch.tensor([0])),
            lambda: layer.batch_repeat_interleave(2),
            lambda: layer.batch_select_indices(torch.tensor([1, 0])),
        ]
        for pick in picks:
            pick()
            assert layer.buffers is not None
            assert not any(buffer.is_inference() for buffer in layer.buffers)
    assert layer.buffers is not None
    layer.buffers[0].add_(1)
    loaded = layer_of(0)
    with torch.inference_mode():
        saved = layer_of(2)
        saved.add_originals(*tokens(0, 1))
        loaded.load(saved.state(), 0, CPU)
    assert not loaded.originals(0).is_inference()
    assert loaded.buffers is not None
    assert not any(buffer.is_inference() for buffer in loaded.buffers)
