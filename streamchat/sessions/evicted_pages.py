"""Converts evicted tokens to bytes and back: safetensors with the tensors of all layers, exact or in int8."""

from __future__ import annotations

import json
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from streamchat.cache.evicted import EvictedTokens
from streamchat.cache.layers.slots import SCALES, CopiedStates
from streamchat.sessions.tensor_file import tensors_to_bytes

Kind = Literal["native", "int8"]
_KEY = "streamchat"
_SCALE = ".scale"


def to_bytes(tokens: EvictedTokens, kind: Kind) -> bytes:
    """Return evicted tokens as bytes.

    Args:
        tokens: The tokens.
        kind: 'native' is exact. 'int8' stores keys and values in 8 bits, with one scale per token and head, unless they
            are codes already, and omits the float32 originals.
    """
    tensors: dict[str, Tensor] = {}
    stacks: dict[str, list[list[object]]] = {}
    parts = {"slots": tokens.slots} | ({"originals": tokens.originals} if kind == "native" else {})
    for part, states in parts.items():
        stacks[part] = []
        for i, (name, layers, stack) in enumerate(states.stacks):
            key = f"{part}.{i}"
            stacks[part].append([name, layers, str(stack.dtype).removeprefix("torch.")])
            if kind == "int8" and name in SCALES and stack.is_floating_point():
                tensors[key], tensors[key + _SCALE] = _quantized(stack)
            else:
                tensors[key] = stack.contiguous()
    facts = {"runs": tokens.runs, "position": tokens.position, "stacks": stacks, "moved": tokens.moved}
    tensors[_KEY] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    return tensors_to_bytes(tensors)


def from_bytes(data: bytes) -> EvictedTokens | None:
    """Return the tokens that `to_bytes` converted; None if the bytes are not valid."""
    try:
        tensors = load(data)
        facts = json.loads(bytes(tensors.pop(_KEY).tolist()))
        parts = {part: _states(part, named, tensors) for part, named in facts["stacks"].items()}
        runs = tuple((int(first), int(stop)) for first, stop in facts["runs"])
        return EvictedTokens(
            runs,
            parts["slots"],
            parts.get("originals", CopiedStates()),
            int(facts["position"]),
            moved=int(facts.get("moved", 0)),
            is_exact=not any(name.endswith(_SCALE) for name in tensors),
        )
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def _states(part: str, named: list[list[object]], tensors: dict[str, Tensor]) -> CopiedStates:
    stacks: list[tuple[str, tuple[int, ...], Tensor]] = []
    for i, (name, layers, dtype) in enumerate(named):
        tensor = tensors[f"{part}.{i}"]
        scale = tensors.get(f"{part}.{i}{_SCALE}")
        if scale is not None:
            tensor = (tensor.float() * scale).to(getattr(torch, str(dtype)))
        stacks.append((str(name), tuple(layers), tensor))  # type: ignore[arg-type]
    return CopiedStates(tuple(stacks))


def _quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `x` in int8, and float32 scales (..., 1)."""
    wide = x.float()
    scale = wide.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / 127
    return (wide / scale).round().to(torch.int8), scale
