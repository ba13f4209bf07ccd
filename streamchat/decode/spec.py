"""The parts of a model that a decode step needs; `families` reads them from the model's own modules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamchat.quantization.experts import QuantizedExperts

Rotary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x, (1, n) positions) -> cos and sin, (1, n, rotary_dim) each, in the order in which heads are rotated."""


@dataclass(frozen=True)
class NormSpec:
    """RMSNorm, or LayerNorm if `is_layer_norm`."""

    weight: Tensor
    """(width,) float32; (heads, head_dim) if each head has its own weights."""
    bias: Tensor | None
    """Like `weight`."""
    eps: float
    is_layer_norm: bool
    whole: bool = False
    """For queries and keys: whether all heads of a token are normalized together; weight: (heads * head_dim,)."""


@dataclass(frozen=True)
class QkvLayout:
    """Where queries, keys and values are in the concatenated outputs of `qkv_proj`, in heads. The first is a query.

    The query heads that share a key head are next to each other.
    """

    query_group_stride: int
    """Distance from the first query of a key head to that of the next key head."""
    key_start: int
    key_stride: int
    value_start: int
    value_stride: int
    copies: int = 1
    """Consecutive cached key heads with the same key and value (Falcon). Strides are then between such groups."""


def separate(num_heads: int, num_kv_heads: int) -> QkvLayout:
    """Return the layout of all queries, then all keys, then all values."""
    return QkvLayout(num_heads // num_kv_heads, num_heads, 1, num_heads + num_kv_heads, 1)


BY_HEAD = QkvLayout(3, 1, 3, 2, 3)
"""The layout of query, key and value of one head after the other; each query head has its own key head."""


@dataclass(frozen=True)
class AttentionSpec:
    """The attention of a block. Layers in a tuple share their input; their outputs are concatenated."""

    qkv_proj: tuple[nn.Module, ...]
    layout: QkvLayout
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    """Factor on the scores."""
    o_proj: nn.Module
    q_norm: NormSpec | None = None
    k_norm: NormSpec | None = None
    rotary: int | None = 0
    """Index of the model's `rotaries`; None for an attention without positions."""
    interleaved: bool = False
    """Whether neighboring elements are rotated as pairs, instead of elements of the two halves."""
    window: int | None = None
    """Number of tokens that a token sees, including itself; None for all."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap)."""
    clip: float | None = None
    """Queries, keys and values are limited to this magnitude."""


@dataclass(frozen=True)
class MlpSpec:
    """The MLP of a block."""

    up_proj: tuple[nn.Module, ...]
    """(gate, up), or one layer."""
    act: str
    """A name in `ACTIVATIONS`."""
    down_proj: nn.Module
    fused: bool = False
    """Whether the only layer has the rows of the gate, then those of up."""


@dataclass(frozen=True)
class ExpertsSpec:
    """A mixture of experts: gated MLPs without biases, of which a router chooses some for each token."""

    router: Tensor
    """(experts, hidden)."""
    gate_up: Tensor
    """(experts, 2 * width, hidden): of each expert the rows of the gate, then those of up."""
    down: Tensor
    """(experts, hidden, width)."""
    act: str
    """A name in `ACTIVATIONS`."""
    top_k: int
    """Experts per token."""
    is_normalized: bool
    """Whether the weights of the chosen experts are their softmax; else their shares in the softmax of all."""
    shared: MlpSpec | None = None
    """An MLP that is computed for every token, and added."""
    shared_gate: nn.Module | None = None
    """Hidden -> 1: the sigmoid of this is a factor on `shared`."""
    quantized: QuantizedExperts | None = None
    """Quantized copies of `gate_up` and `down`."""


@dataclass(frozen=True)
class BlockSpec:
    """One transformer block."""

    input_norm: NormSpec | None
    attention: AttentionSpec
    mlp_norm: NormSpec | None
    """None: the MLP gets the input of the attention if `parallel`, else the residual stream without a norm."""
    mlp: MlpSpec | ExpertsSpec
    attention_out_norm: NormSpec | None = None
    """Applied to the attention's output before it is added to the residual stream."""
    mlp_out_norm: NormSpec | None = None
    parallel: bool = False
    """Whether the MLP gets the input of the block, instead of that plus the attention's output."""
    residual_scale: float = 1.0
    """Factor on both outputs before they are added to the residual stream."""


@dataclass(frozen=True)
class ModelSpec:
    """A causal language model from ids to logits."""

    embedding: nn.Module
    rotaries: tuple[Rotary, ...]
    blocks: tuple[BlockSpec, ...]
    norm: NormSpec
    head: nn.Module
    dtype: torch.dtype
    embedding_scale: float = 1.0
    """Factor on the embeddings, as the model rounds it to its dtype."""
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def linear_layers(self) -> list[Any]:
        """All layers that are a product with a weight matrix; routers and experts are not layers."""
        layers: list[Any] = [self.head]
        for block in self.blocks:
            layers += [*block.attention.qkv_proj, block.attention.o_proj]
            mlp = block.mlp.shared if isinstance(block.mlp, ExpertsSpec) else block.mlp
            layers += [] if mlp is None else [*mlp.up_proj, mlp.down_proj]
            if isinstance(block.mlp, ExpertsSpec) and block.mlp.shared_gate is not None:
                layers.append(block.mlp.shared_gate)
        return layers

    @property
    def experts(self) -> list[ExpertsSpec]:
        """All mixtures of experts."""
        return [block.mlp for block in self.blocks if isinstance(block.mlp, ExpertsSpec)]


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}


def activation_name(module: Any) -> str:
    """Return which of `ACTIVATIONS` a module computes; '' for another function."""
    x = torch.linspace(-8, 8, 1000)
    with torch.no_grad():
        found = module(x)
    close = {name for name, function in ACTIVATIONS.items() if torch.allclose(found, function(x), rtol=0, atol=1e-5)}
    return close.pop() if close else ""
