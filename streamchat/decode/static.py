"""A decode step whose kernels read and write the same addresses for every token, as CUDA graphs require.

What changes from token to token (the id, its position, the first used slot and the next free one) is in tensors on the
device. Attention runs over the whole buffers, with a mask computed from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from streamchat.cache.positions.probe import rope_kinds
from streamchat.decode.eager import Step, decode_step
from streamchat.decode.experts import static_experts
from streamchat.decode.families.registry import model_spec
from streamchat.decode.parts import Attend, Backend, Op, capped_attention, layer_norm
from streamchat.decode.spec import AttentionSpec, NormSpec
from streamchat.decode.static_slots import Buffers, states_for, stored, unturned

# Their angles depend on the text's length, which they read back from the device in the middle of a step.
CHANGING_ROPES = ("dynamic", "longrope")


class Inputs:
    """The input tensors of a step of `length` tokens, on `device`."""

    def __init__(self, device: torch.device, length: int = 1) -> None:
        self.length = length

        def number(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.long, device=device)

        with torch.inference_mode(False):  # filled outside inference mode too
            self.ids, self.positions = number(1, length), number(1, length)
            self.start, self.slot, self.count = number(1), number(1), number(1)

    def fill(self, ids: Tensor, positions: Tensor, start: int, slot: int) -> None:
        """Set the next step's (1, n) `ids` and `positions`, n <= `length`; they may be on another device.

        The first token is written to `slot`, the others to those after it. Each attends to the slots from `start` up to
        its own. If n is less than `length`, the rest is padding: the last id again, at the last position.
        """
        count = ids.shape[1]
        self.ids[:, :count].copy_(ids)
        self.positions[:, :count].copy_(positions)
        if count < self.length:
            self.ids[:, count:].copy_(ids[:, -1:].expand(1, self.length - count))
            self.positions[:, count:].copy_(positions[:, -1:].expand(1, self.length - count))
        # passed as kernel arguments: no copy from the host
        self.start.fill_(start)
        self.slot.fill_(slot)
        self.count.fill_(count)


@dataclass(frozen=True)
class StaticLayer:
    """One layer of the cache as a step sees it."""

    buffers: Buffers
    slot: Tensor
    """(1,) int64: the slot to write."""
    mask: Tensor
    """(1, 1, 1, slots) of the model's dtype, added to the scores: 0 or -inf."""


def static_step(model: Any) -> Step | None:
    """Return the step of `model` on `StaticLayer`s, for `bind`; None if the model is not supported."""
    spec = None if changes_with_length(model) else model_spec(model)
    return None if spec is None else decode_step(spec, STATIC)


def changes_with_length(model: Any) -> bool:
    """Return whether the angles of `model` depend on the length of the text."""
    return any(kind in CHANGING_ROPES for module in model.modules() for kind in rope_kinds(module))


def bind(step: Step, inputs: Inputs, buffers: Sequence[Buffers], dtype: torch.dtype) -> Callable[[], Tensor]:
    """Bind `step` to these tensors: each call reads `inputs`, writes one slot of `buffers`, returns (1, 1, vocabulary).

    The call is idempotent. `dtype` is the model's.
    """

    def run() -> Tensor:
        keys = buffers[0][0]
        slots = torch.arange(keys.shape[2], device=keys.device)
        unused = (slots < inputs.start).logical_or_(slots > inputs.slot)
        mask = torch.zeros(keys.shape[2], dtype=dtype, device=keys.device).masked_fill_(unused, float("-inf"))
        mask = mask.view(1, 1, 1, -1)
        layers = [StaticLayer(each, inputs.slot, mask) for each in buffers]
        return step(inputs.ids, inputs.positions, layers)

    return run


def norm(of: NormSpec, dtype: torch.dtype) -> Op:
    """(1, hidden) float32 -> (1, hidden) of `dtype`, without reading anything back from the device."""
    if of.is_layer_norm:
        return layer_norm(of, dtype)
    return lambda h: functional.rms_norm(h, of.weight.shape, of.weight, of.eps).to(dtype)


def attention(of: AttentionSpec) -> Attend:
    """Return the attention of a block: writes one token to its slot and attends to all unmasked slots."""
    window, cap = of.window, of.softcap

    def attend(layer: StaticLayer, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        heads, dim = k.shape
        written = stored(layer.buffers, k.view(1, heads, 1, dim), v.view(1, heads, 1, dim))
        for buffer, part in zip(layer.buffers, written, strict=True):
            buffer.index_copy_(2, layer.slot, part)
        queries, keys, values = states_for(layer.buffers, q.reshape(1, heads, -1, dim))
        mask = layer.mask
        if window is not None:
            slots = torch.arange(mask.shape[-1], device=mask.device)
            mask = mask.masked_fill(slots <= layer.slot - window, float("-inf"))
        if cap is not None:
            attended = capped_attention(queries, keys, values, scale, cap, mask)
        else:
            attended = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
        return unturned(layer.buffers, attended).reshape(1, -1)

    return attend


STATIC = Backend(norm, attention, static_experts)
