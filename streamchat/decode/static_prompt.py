"""A short prompt as a step of fixed length, whose kernels read and write the same addresses for every prompt.

The prompt is padded to the length. Padded tokens write nothing: their slots keep what they had. No other token attends
to them, and the logits are those of the last real token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from streamchat.decode.eager import Step, decode_step
from streamchat.decode.experts import static_experts
from streamchat.decode.families.registry import model_spec
from streamchat.decode.parts import Attend, Backend, capped_attention
from streamchat.decode.spec import AttentionSpec
from streamchat.decode.static import Inputs, changes_with_length, norm
from streamchat.decode.static_slots import Buffers, states_for, stored, unturned

LENGTHS = (16, 32, 64, 128)
"""Tokens of the steps; a prompt takes the shortest that it fits into."""


@dataclass(frozen=True)
class PromptLayer:
    """One layer of the cache as a prompt step sees it."""

    buffers: Buffers
    slots: Tensor
    """(tokens,) int64: the slots of the tokens."""
    real: Tensor
    """(tokens,) bool: which tokens are not padding."""
    mask: Tensor
    """(tokens, slots of the buffers) of the model's dtype, added to the scores: 0 or -inf."""
    last: Tensor
    """(1,) int64: index of the last real token."""


def prompt_step(model: Any) -> Step | None:
    """Return the step of `model` on `PromptLayer`s, for `bind_prompt`; None if the model is not supported.

    Mixtures of experts are not: their experts are chosen for one token.
    """
    spec = None if changes_with_length(model) else model_spec(model)
    return None if spec is None or spec.experts else decode_step(spec, PROMPT)


def bind_prompt(step: Step, inputs: Inputs, buffers: Sequence[Buffers], dtype: torch.dtype) -> Callable[[], Tensor]:
    """Bind `step` to these tensors: each call reads `inputs`, writes the slots of its real tokens in `buffers`, and
    returns the (1, 1, vocabulary) logits of the last one.

    The call is idempotent. `dtype` is the model's.
    """

    def run() -> Tensor:
        keys = buffers[0][0]
        index = torch.arange(inputs.ids.shape[1], device=keys.device)
        all_slots = torch.arange(keys.shape[2], device=keys.device)
        slots = inputs.slot + index
        unused = (all_slots < inputs.start).logical_or(all_slots > slots[:, None])
        mask = torch.zeros(unused.shape, dtype=dtype, device=keys.device).masked_fill_(unused, float("-inf"))
        real = index < inputs.count
        last = (inputs.count - 1).clamp_(min=0)
        layers = [PromptLayer(each, slots, real, mask, last) for each in buffers]
        return step(inputs.ids, inputs.positions, layers)

    return run


def attention(of: AttentionSpec) -> Attend:
    """Return the attention of a block: writes the real tokens to their slots and attends to all unmasked slots."""
    window, cap = of.window, of.softcap

    def attend(layer: PromptLayer, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        tokens, heads, dim = k.shape
        written = stored(layer.buffers, k.transpose(0, 1)[None], v.transpose(0, 1)[None])
        for buffer, part in zip(layer.buffers, written, strict=True):
            _write(buffer, layer, part)
        mask = layer.mask
        if window is not None:
            all_slots = torch.arange(mask.shape[-1], device=mask.device)
            mask = mask.masked_fill(all_slots <= layer.slots[:, None] - window, float("-inf"))
        # query heads that share a key head are further queries of that head, so keys are not repeated
        grouped = q.reshape(tokens, heads, -1, dim).permute(1, 2, 0, 3)
        groups = grouped.shape[1]
        queries, keys, values = states_for(layer.buffers, grouped.reshape(1, heads, groups * tokens, dim))
        mask = mask.repeat(groups, 1)[None, None]
        if cap is not None:
            attended = capped_attention(queries, keys, values, scale, cap, mask)
        else:
            attended = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
        return (
            unturned(layer.buffers, attended).reshape(heads, groups, tokens, -1).permute(2, 0, 1, 3).reshape(tokens, -1)
        )

    return attend


def _write(buffer: Tensor, layer: PromptLayer, part: Tensor) -> None:
    """Write (1, heads, tokens, ...) numbers, codes or scales of the real tokens to their slots."""
    before = buffer.index_select(2, layer.slots)
    real = layer.real.view(-1, *[1] * (part.dim() - 3))
    buffer.index_copy_(2, layer.slots, torch.where(real, part, before))


PROMPT = Backend(norm, attention, static_experts, several=True)
