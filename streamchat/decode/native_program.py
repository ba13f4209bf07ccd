"""A decode step as a program of compiled kernels for a fixed number of tokens, and its workspace.

Weights and cache are in the model's dtypes; everything between them is float32.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from streamchat.decode import operations
from streamchat.decode.operations import Row, hidden_row, lower, result_width
from streamchat.decode.spec import AttentionSpec, ExpertsSpec, ModelSpec, NormSpec
from streamchat.kernels.library import Kernels
from streamchat.kernels.operations import (
    GELU,
    GELU_TANH,
    NO_FUNCTION,
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
        self._mixtures: dict[int, Experts] = {}
        """Keeps the structures alive that the operations point to; by the identity of the mixture."""
        self._operations: list[Operation] = []
        self.hidden = self._rows(hidden_row(model))
        """(tokens, hidden): the embeddings."""
        self.angles = [self._angles(index) for index in range(len(model.rotaries))]
        """Cosines and sines for each of the model's rotaries, (tokens, rotary_dim) each."""
        self.attentions: list[Attention] = []
        """Per layer; the caller sets `keys`, `values`, `format`, `head_stride_bytes` and `cached`."""
        self._logits_shape = 1 if last_only else tokens, result_width([model.head])
        for operation in lower(model):
            self._append(operation)
        self.operations = program(self._operations)

    def new_logits(self) -> Tensor:
        """Return the memory that the next run fills: (tokens, vocabulary), or (1, vocabulary) if `last_only`."""
        logits = torch.empty(self._logits_shape)
        self.operations[-1].each.product.out = logits.data_ptr()
        return logits

    def _angles(self, index: int) -> tuple[Tensor, Tensor]:
        cos, _ = self._model.rotaries[index](self.hidden, torch.zeros(1, 1, dtype=torch.long))
        cos_row, sin_row = (Row(f"{name} {index}", cos.shape[-1]) for name in ("cos", "sin"))
        return self._rows(cos_row), self._rows(sin_row)

    def _append(self, operation: operations.Operation) -> None:
        match operation:
            case operations.Product():
                self._append_product(operation)
            case operations.Attend():
                self._append_attention(operation.of, self._rows(operation.qkv))
            case operations.Route():
                mixture = self._experts(operation.mixture)
                self._mixtures[id(operation.mixture)] = mixture
                self._operations.append(route(mixture))
            case operations.ComputeExperts():
                self._operations += compute_experts(self._mixtures[id(operation.mixture)])

    def _experts(self, mixture: operations.Mixture) -> Experts:
        """Return a mixture of experts for the kernels."""
        of = mixture.of
        (num, hidden), width = of.router.shape, of.down.shape[-1]
        (gate, up_stride), (down, down_stride) = self._stacked(of, width)
        return Experts(
            gate,
            Matrix(gate.data + up_stride // 2, None, width, gate.bits, gate.format),
            down,
            self._norm(mixture.norm),
            x=self._rows(mixture.x).data_ptr(),
            logits=self._rows(mixture.logits).data_ptr(),
            shared=None if mixture.shared is None else self._rows(mixture.shared).data_ptr(),
            normed=self._rows(mixture.normed).data_ptr(),
            activated=self._buffer("experts", of.top_k * width).data_ptr(),
            out=self._rows(mixture.out).data_ptr(),
            shares=self._buffer("shares", of.top_k).data_ptr(),
            factors=self._buffer("factors", 1).data_ptr(),
            chosen=self._buffer("chosen", of.top_k).data_ptr(),  # 32-bit integers
            columns=hidden,
            up_stride=up_stride,
            down_stride=down_stride,
            logits_stride=mixture.logits.width,
            num_experts=num,
            top_k=of.top_k,
            count=self._tokens,
            function=FUNCTIONS[of.act],
            is_normalized=of.is_normalized,
            has_gate=of.shared_gate is not None,
        )

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

    def _input(self, given: operations.Input, rows: slice) -> dict[str, Any]:
        """Return the members of a product for its input."""

        def address(row: Row | None) -> int | None:
            return None if row is None else self._rows(row)[rows].data_ptr()

        return {
            "x": address(given.x),
            "added": address(given.added),
            "more": address(given.more),
            "sum": address(given.sum),
            "norm": self._norm(given.norm),
            "added_norm": self._norm(given.added_norm),
            "added_scale": given.added_scale,
        }

    def _append_attention(self, of: AttentionSpec, qkv: Tensor) -> None:
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

    def _norm(self, norm: NormSpec | None) -> Norm:
        if norm is None:
            return Norm()
        self._weights += [tensor for tensor in (norm.weight, norm.bias) if tensor is not None]
        bias = None if norm.bias is None else norm.bias.data_ptr()
        return Norm(norm.weight.data_ptr(), bias, norm.eps, int(norm.is_layer_norm))

    def _append_product(self, of: operations.Product) -> None:
        """Append the product of an input, with one row per token, with the weights of some layers."""
        rows = slice(-self._logits_shape[0], None) if of.is_head else slice(None)
        members: dict[str, Any] = {"function": FUNCTIONS[of.function] if of.function else NO_FUNCTION}
        if isinstance(of.given, operations.Attend):
            members["attention"] = ctypes.pointer(self.attentions[of.given.layer])
            columns = of.given.of.num_heads * of.given.of.head_dim
        else:
            members |= self._input(of.given, rows)
            columns = of.given.x.width
        if of.softcap is not None:
            members |= {"function": SOFTCAP, "softcap": of.softcap}
        if not of.is_head:  # those get memory for each run
            members["out"] = self._rows(of.out).data_ptr()
        count = self._logits_shape[0] if of.is_head else self._tokens
        matrices = self._matrices(of.layers, of.gated)
        self._operations.append(
            product(*matrices, columns=columns, out_stride=of.out.width, count=count, gated=of.gated, **members)
        )

    def _matrices(self, layers: tuple[Any, ...], gated: bool) -> list[Matrix]:
        if gated and len(layers) == 1:
            return self._halves(layers[0])
        whole = None if gated else quantized_together(layers)
        if whole is not None:
            return [self._quantized(whole, joined_bias(layers, torch.float32))]
        return [self._layer(layer) for layer in layers]

    def _layer(self, layer: Any) -> Matrix:
        if isinstance(layer, Tensor):
            return self._native(layer)
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

    def _rows(self, row: Row) -> Tensor:
        return self._buffer(row.name, row.width)

    def _buffer(self, name: str, width: int) -> Tensor:
        return self._workspace.buffer(name, self._tokens, width)


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
