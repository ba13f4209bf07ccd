"""The operations of a decode step: what a model description is lowered to, before any kernel is chosen.

Two back ends run the same list: the compiled kernels of a CPU (`native_program`) and the fused kernels of a GPU
(`fused`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from streamchat.decode.spec import AttentionSpec, BlockSpec, ExpertsSpec, MlpSpec, ModelSpec, NormSpec


@dataclass(frozen=True)
class Row:
    """A buffer with one row per token; equal names and widths mean the same memory."""

    name: str
    width: int


@dataclass(frozen=True)
class Input:
    """What a product reads: `x`, plus `added_scale` times the sum of `added` and `more`, then normalized."""

    x: Row
    norm: NormSpec | None = None
    added: Row | None = None
    more: Row | None = None
    added_norm: NormSpec | None = None
    """The norm of `added`."""
    added_scale: float = 1.0
    sum: Row | None = None
    """Where the sum is written, before the norm."""

    @property
    def summed(self) -> Row:
        """The row with the sum; `x` if nothing is added."""
        return self.x if self.sum is None else self.sum


@dataclass(frozen=True)
class Attend:
    """Limit, normalize and rotate the new queries and keys, append keys and values to the cache, attend."""

    of: AttentionSpec
    qkv: Row
    """Outputs of the query, key and value layers, concatenated."""
    layer: int
    """Index of the layer of the cache."""


@dataclass(frozen=True)
class Product:
    """Multiply an input with weights. The results of several layers are concatenated, or multiplied if `gated`."""

    layers: tuple[Any, ...]
    """Linear layers that share their input; a router is a tensor of weights."""
    given: Input | Attend
    out: Row
    function: str = ""
    """A name in `ACTIVATIONS`, of the gate if there is one."""
    gated: bool = False
    softcap: float | None = None
    """Results become softcap * tanh(result / softcap)."""
    is_head: bool = False
    """Whether the results are the logits, which may be needed for the last token only."""


@dataclass(frozen=True)
class Mixture:
    """The buffers of a mixture of experts."""

    of: ExpertsSpec
    x: Row
    norm: NormSpec | None
    """The norm of `x`."""
    logits: Row
    """Results of the router and, after these, of the gate of the shared MLP."""
    normed: Row
    shared: Row | None
    """Results of the MLP that all tokens share."""
    out: Row


@dataclass(frozen=True)
class Route:
    """Normalize the input of a mixture, and choose the experts."""

    mixture: Mixture


@dataclass(frozen=True)
class ComputeExperts:
    """Compute the chosen experts, and add the shared MLP."""

    mixture: Mixture


Operation = Product | Attend | Route | ComputeExperts


def lower(model: ModelSpec) -> list[Operation]:
    """Return the operations that compute the logits of a model from the row `hidden_row(model)`."""
    return _Lowering(model).operations


def hidden_row(model: ModelSpec) -> Row:
    """Return the row of the embeddings."""
    table: Any = model.embedding.weight
    return Row("hidden", table.shape[1])


def result_width(layers: Sequence[Any], gated: bool = False) -> int:
    """Return the width of the results of a product: concatenated, or multiplied if there is a gate."""
    rows: int = sum(len(each) if isinstance(each, Tensor) else each.out_features for each in layers)
    return rows // 2 if gated else rows


@dataclass(frozen=True)
class _Pending:
    """Outputs that are not yet added to the residual stream."""

    outputs: tuple[Row, ...] = ()
    norm: NormSpec | None = None
    """The norm of the first output."""
    scale: float = 1.0


class _Lowering:
    def __init__(self, model: ModelSpec) -> None:
        self.operations: list[Operation] = []
        hidden = hidden_row(model)
        self._attn_out, self._mlp_out = (Row(name, hidden.width) for name in ("attn_out", "mlp_out"))
        # The residual stream: each sum is written next to the one before it, which is still being read.
        self._sums, self._next_sums = hidden, Row("next_hidden", hidden.width)
        self._layers = 0
        pending = _Pending()
        for block in model.blocks:
            pending = self._block(block, pending)
        given = self._input(_scaled(model.norm, model.logit_scale), pending, is_last=True)
        logits = Row("logits", result_width([model.head]))
        self.operations.append(Product((model.head,), given, logits, softcap=model.logit_softcap, is_head=True))

    def _block(self, block: BlockSpec, pending: _Pending) -> _Pending:
        """Append the operations of a block."""
        of = block.attention
        qkv = self._product("qkv", of.qkv_proj, self._input(block.input_norm, pending))
        attend = Attend(of, qkv, self._layers)
        self._layers += 1
        self.operations.append(attend)
        self._product("attn_out", (of.o_proj,), attend)
        if block.parallel:
            self._mlp(block.mlp, self._input(block.mlp_norm or block.input_norm, _Pending()))
            return _Pending((self._attn_out, self._mlp_out), scale=block.residual_scale)
        attended = _Pending((self._attn_out,), block.attention_out_norm, block.residual_scale)
        self._mlp(block.mlp, self._input(block.mlp_norm, attended))
        return _Pending((self._mlp_out,), block.mlp_out_norm, block.residual_scale)

    def _mlp(self, mlp: MlpSpec | ExpertsSpec, given: Input, out: str = "mlp_out") -> None:
        """Append an MLP that reads `given` and writes to the row `out`."""
        if isinstance(mlp, ExpertsSpec):
            self._experts(mlp, given)
            return
        gated = mlp.fused or len(mlp.up_proj) == 2
        activated = self._product("activated", mlp.up_proj, given, function=mlp.act, gated=gated)
        self._product(out, (mlp.down_proj,), Input(activated))

    def _experts(self, of: ExpertsSpec, given: Input) -> None:
        """Append a mixture of experts that reads `given`."""
        hidden: int = of.router.shape[1]
        layers = (of.router,) if of.shared_gate is None else (of.router, of.shared_gate)
        logits = self._product("router", layers, given)
        shared = None if of.shared is None else Row("shared", hidden)
        mixture = Mixture(of, given.summed, given.norm, logits, Row("normed", hidden), shared, self._mlp_out)
        self.operations.append(Route(mixture))
        if of.shared is not None:
            self._mlp(of.shared, Input(mixture.normed), "shared")
        self.operations.append(ComputeExperts(mixture))

    def _product(self, name: str, layers: tuple[Any, ...], given: Input | Attend, **more: Any) -> Row:
        """Append the product of `given` with `layers`; returns the row of the results, named `name`."""
        out = Row(name, result_width(layers, more.get("gated", False)))
        self.operations.append(Product(layers, given, out, **more))
        return out

    def _input(self, norm: NormSpec | None, pending: _Pending, is_last: bool = False) -> Input:
        """Return the normalized residual stream, after adding `pending` to it."""
        added, more = [*pending.outputs, None, None][:2]
        given = Input(self._sums, norm, added, more, pending.norm, pending.scale)
        if not pending.outputs or is_last:
            return given
        self._sums, self._next_sums = self._next_sums, self._sums
        return replace(given, sum=self._sums)


def _scaled(norm: NormSpec, scale: float) -> NormSpec:
    """Return the norm followed by a factor."""
    if scale == 1.0:
        return norm
    return replace(norm, weight=norm.weight * scale, bias=None if norm.bias is None else norm.bias * scale)
