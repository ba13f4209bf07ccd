"""A decode step as a program of compiled kernels for a fixed number of tokens, and its workspace.

Weights and cache are in the model's dtypes; everything between them is float32.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from streamchat.decode.spec import AttentionSpec, BlockSpec, ExpertsSpec, MlpSpec, ModelSpec, NormSpec
from streamchat.kernels.library import Kernels
from streamchat.kernels.operations import (
    GELU,
    GELU_TANH,
    QUERIES_AT_ONCE,
    RELU,
    RELU2,
    SILU,
    SOFTCAP,
    TILE,
    Attention,
    Experts,
    Matrix,
    Norm,
    Operation,
    attend,
    compute_experts,
    product,
    program,
    route,
    unit_size,
)
from streamchat.quantization.linear import QuantizedLinear, joined_bias, quantized_together
from streamchat.quantization.unpack import FORMATS
from streamchat.quantization.weights import QuantizedWeight

FUNCTIONS = {"silu": SILU, "gelu": GELU, "gelu_tanh": GELU_TANH, "relu": RELU, "relu2": RELU2}
"""The activations that the kernels compute."""


@dataclass(frozen=True)
class _Pending:
    """Outputs that are not yet added to the residual stream."""

    outputs: tuple[Tensor, ...] = ()
    norm: NormSpec | None = None
    """The norm of the first output."""
    scale: float = 1.0


class Workspace:
    """Memory that all programs of a model share, one at a time; its size does not depend on the length of the text.

    For the default model, 256 tokens take 6 MB. Memory that no program has used yet is only reserved.

    Args:
        model: Determines the sizes.
        kernels: Report the memory they need for partial results.
        max_tokens: Maximum tokens of a program.
        threads: Maximum threads that run a program.
    """

    def __init__(self, model: ModelSpec, kernels: Kernels, max_tokens: int, threads: int) -> None:
        self._max_tokens = max_tokens
        self._buffers: dict[tuple[str, int, bool], Tensor] = {}
        self.partial = torch.empty(_partial_size(model, kernels, max_tokens, threads))
        """Partial results of one attention."""

    def buffer(self, name: str, rows: int, width: int) -> Tensor:
        """Return (rows, width) float32; the same memory for the same name and width."""
        key = name, width, rows == 1
        if key not in self._buffers:
            self._buffers[key] = torch.empty(1 if rows == 1 else self._max_tokens, width)
        return self._buffers[key][:rows]


class Program:
    """The operations for a fixed number of tokens.

    Fill `hidden` and `angles`, point `attentions` to the caches, get `new_logits`, then run `operations`.

    Args:
        model: The model to compute.
        workspace: The workspace of that model.
        tokens: Tokens per run.
        last_only: Compute logits for the last token only.
        threads: Threads that run it.
    """

    def __init__(self, model: ModelSpec, workspace: Workspace, tokens: int, last_only: bool, threads: int) -> None:
        self._model, self._tokens, self._threads, self._workspace = model, tokens, threads, workspace
        self._weights: list[Tensor] = []
        """Keeps the tensors alive that the operations point to."""
        self._mixtures: list[Experts] = []
        """Keeps the structures alive that the operations point to."""
        self._operations: list[Operation] = []
        table: Any = model.embedding.weight
        width: int = table.shape[1]
        self.hidden = self._buffer("hidden", width)
        """(tokens, hidden): the embeddings."""
        self.angles = [self._angles(index) for index in range(len(model.rotaries))]
        """Cosines and sines for each of the model's rotaries, (tokens, rotary_dim) each."""
        self.attentions: list[Attention] = []
        """Per layer; the caller sets `keys`, `values`, `format`, `head_stride_bytes` and `cached`."""
        self._attn_out, self._mlp_out = (self._buffer(name, width) for name in ("attn_out", "mlp_out"))
        self._sums, self._next_sums = self.hidden, self._buffer("next_hidden", width)
        # The residual stream: each sum is written next to the one before it, which is still being read.
        pending = _Pending()
        for block in model.blocks:
            pending = self._block(block, pending)
        head = self._normed_input(
            _scaled(model.norm, model.logit_scale), pending, slice(-1, None) if last_only else slice(None)
        )
        if model.logit_softcap is not None:
            head |= {"function": SOFTCAP, "softcap": model.logit_softcap}
        self._logits_shape = 1 if last_only else tokens, _rows((model.head,))
        self._append_product((model.head,), **head, count=self._logits_shape[0])
        self.operations = program(self._operations)

    def new_logits(self) -> Tensor:
        """Return the memory that the next run fills: (tokens, vocabulary), or (1, vocabulary) if `last_only`."""
        logits = torch.empty(self._logits_shape)
        self.operations[-1].each.product.out = logits.data_ptr()
        return logits

    def _angles(self, index: int) -> tuple[Tensor, Tensor]:
        cos, _ = self._model.rotaries[index](self.hidden, torch.zeros(1, 1, dtype=torch.long))
        return self._buffer(f"cos {index}", cos.shape[-1]), self._buffer(f"sin {index}", cos.shape[-1])

    def _block(self, block: BlockSpec, pending: _Pending) -> _Pending:
        """Append the operations of a block."""
        qkv = self._product("qkv", block.attention.qkv_proj, **self._normed_input(block.input_norm, pending))
        attention = self._attention(block.attention, qkv)
        self._product("attn_out", (block.attention.o_proj,), attention=ctypes.pointer(attention))
        if block.parallel:
            self._mlp(block.mlp, self._normed_input(block.mlp_norm or block.input_norm, _Pending()))
            return _Pending((self._attn_out, self._mlp_out), scale=block.residual_scale)
        attended = _Pending((self._attn_out,), block.attention_out_norm, block.residual_scale)
        self._mlp(block.mlp, self._normed_input(block.mlp_norm, attended))
        return _Pending((self._mlp_out,), block.mlp_out_norm, block.residual_scale)

    def _mlp(self, mlp: MlpSpec | ExpertsSpec, given: dict[str, Any], out: str = "mlp_out") -> Tensor:
        """Append an MLP that reads `given`; returns its output, in the buffer `out`."""
        if isinstance(mlp, ExpertsSpec):
            return self._experts(mlp, given)
        gated = mlp.fused or len(mlp.up_proj) == 2
        activated = self._product("activated", mlp.up_proj, **given, function=FUNCTIONS[mlp.act], gated=gated)
        return self._product(out, (mlp.down_proj,), x=activated.data_ptr())

    def _experts(self, of: ExpertsSpec, given: dict[str, Any]) -> Tensor:
        """Append a mixture of experts that reads `given`; returns its output."""
        (num, hidden), width = of.router.shape, of.down.shape[-1]
        matrices = [self._native(of.router)]
        matrices += [] if of.shared_gate is None else [self._layer(of.shared_gate)]
        logits = self._buffer("router", sum(matrix.rows for matrix in matrices))
        normed, shares = self._buffer("normed", hidden), self._buffer("shares", of.top_k)
        self._operations.append(
            product(
                *matrices,
                columns=hidden,
                out=logits.data_ptr(),
                out_stride=logits.shape[1],
                count=self._tokens,
                **given,
            )
        )
        (gate, up_stride), (down, down_stride) = self._stacked(of, width)
        experts = Experts(
            gate,
            Matrix(gate.data + up_stride // 2, None, width, gate.bits, gate.format),
            down,
            given["norm"],
            x=given.get("sum") or given["x"],
            logits=logits.data_ptr(),
            normed=normed.data_ptr(),
            activated=self._buffer("experts", of.top_k * width).data_ptr(),
            out=self._mlp_out.data_ptr(),
            shares=shares.data_ptr(),
            factors=self._buffer("factors", 1).data_ptr(),
            chosen=self._buffer("chosen", of.top_k).data_ptr(),  # 32-bit integers
            columns=hidden,
            up_stride=up_stride,
            down_stride=down_stride,
            logits_stride=logits.shape[1],
            num_experts=num,
            top_k=of.top_k,
            count=self._tokens,
            function=FUNCTIONS[of.act],
            is_normalized=of.is_normalized,
            has_gate=of.shared_gate is not None,
        )
        self._mixtures.append(experts)
        self._operations.append(route(experts))
        if of.shared is not None:
            experts.shared = self._mlp(of.shared, {"x": normed.data_ptr()}, "shared").data_ptr()
        self._operations += compute_experts(experts)
        return self._mlp_out

    def _stacked(self, of: ExpertsSpec, width: int) -> tuple[tuple[Matrix, int], tuple[Matrix, int]]:
        """Return gate and up, and down, of the first expert, each with the bytes from expert to expert."""
        count, hidden = of.router.shape
        if of.quantized is not None:
            up, down = of.quantized.wholes
            found = [self._quantized(whole, None) for whole in (up, down)]
            sizes = [whole.data.nbytes // count for whole in (up, down)]
        else:
            stacks = [each.detach().contiguous() for each in (of.gate_up, of.down)]
            found = [self._native(stack) for stack in stacks]
            sizes = [stack.nbytes // count for stack in stacks]
        found[0].rows, found[1].rows = width, hidden
        return (found[0], sizes[0]), (found[1], sizes[1])

    def _native(self, weight: Tensor, bias: Tensor | None = None) -> Matrix:
        """Return a matrix of native weights; keeps them alive."""
        weight = weight.detach().contiguous()
        self._weights.append(weight)
        bits = 8 * weight.element_size()
        return Matrix(weight.data_ptr(), self._address(bias), len(weight), bits, FORMATS[weight.dtype])

    def _normed_input(self, norm: NormSpec | None, pending: _Pending, rows: slice = slice(None)) -> dict[str, Any]:
        """Return the members of a product for the normalized residual stream, after adding `pending` to it."""
        first, second = ([each[rows].data_ptr() for each in pending.outputs] + [None, None])[:2]
        given: dict[str, Any] = {"x": self._sums[rows].data_ptr(), "added": first, "more": second}
        given["norm"] = self._norm(norm)
        given |= {"added_norm": self._norm(pending.norm), "added_scale": pending.scale}
        if pending.outputs and rows == slice(None):
            self._sums, self._next_sums = self._next_sums, self._sums
            given["sum"] = self._sums.data_ptr()
        return given

    def _attention(self, of: AttentionSpec, qkv: Tensor) -> Attention:
        """Append the attention of all tokens; `qkv` is (tokens, heads * head_dim)."""
        layout, dim, heads = of.layout, of.head_dim, qkv[0].view(-1, of.head_dim)
        cos, sin = (None, None) if of.rotary is None else self.angles[of.rotary]
        shares_weights = of.q_norm is None or of.q_norm.weight.shape == (dim,)
        attention = Attention(
            query=heads.data_ptr(),
            key=heads[layout.key_start :].data_ptr(),
            value=heads[layout.value_start :].data_ptr(),
            cos=None if cos is None else cos.data_ptr(),
            sin=None if sin is None else sin.data_ptr(),
            partial=self._workspace.partial.data_ptr(),
            query_norm=self._norm(of.q_norm),
            key_norm=self._norm(of.k_norm),
            query_stride=layout.query_group_stride * dim,
            key_stride=layout.key_stride * dim,
            value_stride=layout.value_stride * dim,
            token_stride=qkv.stride(0),
            norm_stride=0 if shares_weights else dim,
            tokens=self._tokens,
            rotary_dim=0 if cos is None else cos.shape[1],
            num_kv_heads=of.num_kv_heads,
            num_kv_groups=of.num_heads // of.num_kv_heads,
            head_dim=dim,
            spans=_spans(self._tokens, of.num_kv_heads, of.num_heads // of.num_kv_heads, self._threads),
            window=of.window or 0,
            is_interleaved=of.interleaved,
            norms_whole=of.q_norm is not None and of.q_norm.whole,
            repeats=layout.copies - 1,
            scale=of.scale,
            softcap=of.softcap or 0.0,
            clip=of.clip or 0.0,
        )
        self._operations += attend(attention)
        self.attentions.append(attention)
        return attention

    def _norm(self, norm: NormSpec | None) -> Norm:
        if norm is None:
            return Norm()
        self._weights += [tensor for tensor in (norm.weight, norm.bias) if tensor is not None]
        bias = None if norm.bias is None else norm.bias.data_ptr()
        return Norm(norm.weight.data_ptr(), bias, norm.eps, int(norm.is_layer_norm))

    def _product(self, name: str, layers: tuple[Any, ...], **members: Any) -> Tensor:
        """Append the product of an input, with one row per token, with `layers`.

        Args:
            name: Names the buffer for the results.
            layers: Linear layers that share their input.
            members: Members of the operation that describe its input and activation.

        Returns:
            The results, concatenated or, with a gate, multiplied: (tokens, rows of all or of one).
        """
        out = self._buffer(name, _rows(layers, **members))
        self._append_product(layers, out=out.data_ptr(), count=self._tokens, **members)
        return out

    def _append_product(self, layers: tuple[Any, ...], **members: Any) -> None:
        """Append the product of an input with `layers`; see `_product`."""
        matrices = self._matrices(layers, bool(members.get("gated")))
        stride = _rows(layers, **members)
        self._operations.append(product(*matrices, columns=layers[0].in_features, out_stride=stride, **members))

    def _matrices(self, layers: tuple[Any, ...], gated: bool) -> list[Matrix]:
        if gated and len(layers) == 1:
            return self._halves(layers[0])
        whole = None if gated else quantized_together(layers)
        if whole is not None:
            return [self._quantized(whole, joined_bias(layers, torch.float32))]
        return [self._layer(layer) for layer in layers]

    def _layer(self, layer: Any) -> Matrix:
        bias = joined_bias((layer,), torch.float32)
        if isinstance(layer, QuantizedLinear):
            return self._quantized(layer.quantized, bias)
        return self._native(layer.weight, bias)

    def _halves(self, layer: Any) -> list[Matrix]:
        """Return both halves of the rows of a layer, as matrices."""
        first = self._layer(layer)
        rows = first.rows // 2
        if isinstance(layer, QuantizedLinear):
            columns, unit = unit_size(first.bits, first.format)
            size = rows // TILE * (layer.in_features // columns) * unit
        else:
            size = rows * layer.in_features * first.bits // 8
        bias = None if first.bias is None else first.bias + rows * torch.float32.itemsize
        return [
            Matrix(first.data, first.bias, rows, first.bits, first.format),
            Matrix(first.data + size, bias, rows, first.bits, first.format),
        ]

    def _quantized(self, weight: QuantizedWeight, bias: Tensor | None) -> Matrix:
        self._weights.append(weight.data)
        return weight.matrix(self._address(bias))

    def _address(self, bias: Tensor | None) -> int | None:
        if bias is None:
            return None
        self._weights.append(bias)
        return bias.data_ptr()

    def _buffer(self, name: str, width: int) -> Tensor:
        return self._workspace.buffer(name, self._tokens, width)


def _scaled(norm: NormSpec, scale: float) -> NormSpec:
    """Return the norm followed by a factor."""
    if scale == 1.0:
        return norm
    return replace(norm, weight=norm.weight * scale, bias=None if norm.bias is None else norm.bias * scale)


def _rows(layers: tuple[Any, ...], gated: bool = False, **_: Any) -> int:
    """Return the width of the results of a product: concatenated, or multiplied if there is a gate."""
    rows: int = sum(layer.out_features for layer in layers)
    return rows // 2 if gated else rows


def _spans(tokens: int, heads: int, groups: int, threads: int) -> int:
    """Return the number of spans that the slots are read in, so that attention has enough tasks for all threads.

    Several tokens share a task, and each span of each token needs memory.
    """
    if tokens == 1:
        return threads
    tasks = heads * -(-tokens // max(1, QUERIES_AT_ONCE // groups))
    return max(1, min(threads, 4 * threads // tasks))


def _partial_size(model: ModelSpec, kernels: Kernels, max_tokens: int, threads: int) -> int:
    """Return the floats for partial results of the largest attention."""
    attentions = [block.attention for block in model.blocks]
    sizes = {(each.num_kv_heads, each.num_heads // each.num_kv_heads, each.head_dim) for each in attentions}
    return max(
        int(kernels.attention_partial(tokens, heads, groups, dim, _spans(tokens, heads, groups, threads)))
        for heads, groups, dim in sizes
        for tokens in range(1, max_tokens + 1)
    )
