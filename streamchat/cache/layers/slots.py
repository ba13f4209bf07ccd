"""Reads and writes single slots of a layer, with everything that the layer stores for them.

The content of slots is a dict of tensors, (batch, heads, slots, ...) each, which callers copy without interpreting it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamchat.cache.layers.codes import dequantize
from streamchat.cache.layers.layer import StreamingLayer

SCALES = {"keys": "key_scales", "values": "value_scales"}
"""Name of the codes in a state -> name of their scales."""
SlotState = dict[str, Tensor]
"""The content of some slots of a layer, by name; dimension 2 is that of the slots."""
ORIGINAL = "original_"
"""Start of the names of the unrotated float32 copies, which only slots at the front have."""


def read_slots(layer: StreamingLayer, first: int, stop: int) -> SlotState:
    """Return views of the content of slots `[first, stop)`: `keys` and `values`, and scales if these are codes."""
    assert layer.storage is not None
    return layer.storage.raw(layer.start + first, stop - first)


def write_slots(layer: StreamingLayer, first: int, state: Mapping[str, Tensor]) -> None:
    """Write the result of a `read_slots` of the same layer to the slots from `first` on, to the bit."""
    if state:
        views = read_slots(layer, first, first + next(iter(state.values())).shape[2])
        for name, tensor in state.items():
            views[name].copy_(tensor)


def read_originals(layer: StreamingLayer, first: int, stop: int) -> SlotState:
    """Return views of the originals of slots `[first, stop)`, as far as these have some; {} if none has."""
    known = layer.num_originals
    if known <= first:
        return {}
    assert layer._originals is not None
    stop = min(stop, known)
    keys, values = (x.narrow(2, first, stop - first) for x in layer._originals)
    return {f"{ORIGINAL}keys": keys, f"{ORIGINAL}values": values}


def set_originals(layer: StreamingLayer, parts: Iterable[Sequence[Tensor]]) -> None:
    """Replace the originals by the concatenation of `parts`, (keys, values) each; none if all are empty."""
    kept = [(keys, values) for keys, values in parts if keys.shape[2]]
    if not kept:
        layer._originals = None
        return
    device = kept[0][0].device if layer.storage is None else layer.storage.device
    joined = [torch.cat([x.to(device) for x in column], dim=2) for column in zip(*kept, strict=True)]
    layer._originals = joined[0], joined[1]


def originals_of(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the originals in a state as (keys, values)."""
    return state[f"{ORIGINAL}keys"], state[f"{ORIGINAL}values"]


def open_front(layer: StreamingLayer, count: int) -> None:
    """Make sure that there are `count` free slots before the first used one; move the used ones in memory if needed.

    The caller then lowers `layer.start` and writes the slots.
    """
    if layer.start >= count or layer.storage is None:
        return
    length = layer.length
    assert count + length <= layer.slots
    for part in layer.storage.parts:
        used = part.narrow(2, layer.start, length)
        part.narrow(2, count, length).copy_(used.clone())  # they overlap
    layer.start, layer.end = count, count + length


@dataclass(frozen=True)
class CopiedStates:
    """Copies of one state per layer, in main memory. Tensors of layers with the same shape are stacked."""

    stacks: tuple[tuple[str, tuple[int, ...], Tensor], ...] = ()
    """(name, layers that have it, their tensors stacked along dimension 0)."""

    def __bool__(self) -> bool:
        return bool(self.stacks)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for _, _, tensor in self.stacks)

    def of(self, layer: int) -> SlotState:
        """Return views of the state of a layer."""
        return {name: stack[layers.index(layer)] for name, layers, stack in self.stacks if layer in layers}

    def stack(self, name: str, layers: Sequence[int]) -> Tensor:
        """Return the tensors of layers that are in the same stack, (layers, batch, heads, slots, ...)."""
        for each, indices, stack in self.stacks:
            if each == name and layers[0] in indices:
                same = list(indices) == list(layers)
                return stack if same else stack[[indices.index(layer) for layer in layers]]
        raise KeyError(name)


def narrowed(states: CopiedStates, first: int, count: int) -> CopiedStates:
    """Return views of `count` slots from slot `first` on."""
    return CopiedStates(tuple((name, layers, stack.narrow(3, first, count)) for name, layers, stack in states.stacks))


def states_in(slots: CopiedStates) -> list[tuple[str, tuple[int, ...], Tensor]]:
    """Return the stacks of keys and of values, dequantized if they are codes; see `CopiedStates.stacks`."""
    named = [stacks for stacks in slots.stacks if stacks[0] in SCALES.values()]
    # layers whose heads differ in size have stacks of their own, but share one of scales
    scales = {(name, i): scale for name, layers, stack in named for i, scale in zip(layers, stack, strict=True)}
    found = []
    for name, layers, stack in slots.stacks:
        if name in SCALES:
            own = [scales[SCALES[name], i] for i in layers if (SCALES[name], i) in scales]
            found.append((name, layers, dequantize(stack, torch.stack(own)) if own else stack))
    return found


def copied(states: Sequence[SlotState]) -> CopiedStates:
    """Return copies of one state per layer, with few operations."""
    groups: dict[tuple[object, ...], tuple[list[int], list[Tensor]]] = {}
    for i, state in enumerate(states):
        for name, tensor in state.items():
            layers, tensors = groups.setdefault((name, tensor.shape, tensor.dtype, tensor.device), ([], []))
            layers.append(i)
            tensors.append(tensor)
    return CopiedStates(
        tuple((str(key[0]), tuple(layers), torch.stack(tensors).to("cpu")) for key, (layers, tensors) in groups.items())
    )
