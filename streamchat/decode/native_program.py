"""A decode step as a program of compiled kernels for a fixed number of tokens, and its workspace.

Weights and cache are in the model's dtypes; everything between them is float32.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from streamchat.decode.spec import BlockSpec, ModelSpec, NormSpec
from streamchat.kernels.library import Kernels
from streamchat.kernels.operations import (
    GELU,
    QUERIES_AT_ONCE,
    SILU,
    Attention,
    Matrix,
    Norm,
    Operation,
    attend,
    product,
    program,
)
from streamchat.quantization.linear import QuantizedLinear, joined_bias, quantized_together
from streamchat.quantization.weights import BITS

ACTIVATIONS = {"SiLU": SILU, "SiLUActivation": SILU, "GELU": GELU, "GELUActivation": GELU}


class Workspace:
    """Memory that all programs of a model share, one at a time; its size does not depend on the length of the text.

    For the default model, 256 tokens take 6 MB. Memory that no program has used yet is reserved only.

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

    Fill `hidden`, `cos` and `sin`, point `attentions` to the caches, get `new_logits`, and run `operations`, which fill
    them.

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
        self._operations: list[Operation] = []
        table: Any = model.embedding.weight
        width: int = table.shape[1]
        self.hidden = self._buffer("hidden", width)
        """(tokens, hidden): the embeddings."""
        cos, _ = model.rotary(self.hidden, torch.zeros(1, 1, dtype=torch.long))
        self.cos, self.sin = (self._buffer(name, cos.shape[-1]) for name in ("cos", "sin"))
        """(tokens, rotary_dim) each."""
        self.attentions: list[Attention] = []
        """Per layer; the caller sets `keys`, `values`, `head_stride_bytes` and `cached`."""
        self._attn_out, self._mlp_out = (self._buffer(name, width) for name in ("attn_out", "mlp_out"))
        self._sums, self._next_sums = self.hidden, self._buffer("next_hidden", width)
        # The residual stream: each sum is written next to the one before it, which is still being read.
        added: tuple[Tensor, ...] = ()
        for block in model.blocks:
            added = self._block(block, added)
        head = self._normed_input(model.norm, added, slice(-1, None) if last_only else slice(None))
        self._logits_shape = 1 if last_only else tokens, _rows((model.head,))
        self._append_product((model.head,), **head, count=self._logits_shape[0])
        self.operations = program(self._operations)

    def new_logits(self) -> Tensor:
        """Return the memory that the next run fills: (tokens, vocabulary), or (1, vocabulary) if `last_only`."""
        logits = torch.empty(self._logits_shape)
        self.operations[-1].each.product.out = logits.data_ptr()
        return logits

    def _block(self, block: BlockSpec, added: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Append the operations of a block; `added` and the return value are residuals not yet added."""
        qkv = self._product("qkv", block.qkv_proj, **self._normed_input(block.input_norm, added))
        attention = self._attention(block, qkv)
        self._product("attn_out", (block.o_proj,), attention=ctypes.pointer(attention))
        pending = () if block.parallel_residual else (self._attn_out,)
        activated = self._product(
            "activated",
            block.up_proj,
            **self._normed_input(block.post_attention_norm, pending),
            function=ACTIVATIONS[type(block.act).__name__],
            gated=len(block.up_proj) == 2,
        )
        self._product("mlp_out", (block.down_proj,), x=activated.data_ptr())
        return (self._attn_out, self._mlp_out) if block.parallel_residual else (self._mlp_out,)

    def _normed_input(self, norm: NormSpec, added: tuple[Tensor, ...], rows: slice = slice(None)) -> dict[str, Any]:
        """Return the members of a product for the normalized residual stream, after adding `added` to it."""
        first, second = ([each[rows].data_ptr() for each in added] + [None, None])[:2]
        given = {"x": self._sums[rows].data_ptr(), "added": first, "more": second, "norm": self._norm(norm)}
        if added and rows == slice(None):
            self._sums, self._next_sums = self._next_sums, self._sums
            given["sum"] = self._sums.data_ptr()
        return given

    def _attention(self, block: BlockSpec, qkv: Tensor) -> Attention:
        """Append the attention of all tokens; `qkv` is (tokens, heads * head_dim)."""
        heads = qkv[0].view(-1, block.head_dim)
        if block.qkv_by_head:
            query, key, value, stride = heads, heads[1:], heads[2:], 3 * block.head_dim
        else:
            query, key, stride = heads, heads[block.num_heads :], block.head_dim
            value = key[block.num_kv_heads :]
        attention = Attention(
            query=query.data_ptr(),
            key=key.data_ptr(),
            value=value.data_ptr(),
            cos=self.cos.data_ptr(),
            sin=self.sin.data_ptr(),
            partial=self._workspace.partial.data_ptr(),
            query_norm=self._norm(block.q_norm),
            key_norm=self._norm(block.k_norm),
            head_stride=stride,
            token_stride=qkv.stride(0),
            tokens=self._tokens,
            rotary_dim=self.cos.shape[1],
            num_kv_heads=block.num_kv_heads,
            num_kv_groups=block.num_heads // block.num_kv_heads,
            head_dim=block.head_dim,
            element_bytes=self._model.dtype.itemsize,
            spans=_spans(self._tokens, block.num_kv_heads, block.num_heads // block.num_kv_heads, self._threads),
            scale=block.scale,
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
        whole = None if gated else quantized_together(layers)
        if whole is not None:
            rows = sum(layer.out_features for layer in layers)
            return [self._matrix(BITS[whole.kind], whole.data, whole.scales, joined_bias(layers, torch.float32), rows)]
        found = []
        for layer in layers:
            quantized = layer.quantized if isinstance(layer, QuantizedLinear) else None
            if quantized is None:
                weight = layer.weight.detach().contiguous()
                bits, data, scales = 8 * weight.element_size(), weight, None
            else:
                bits, data, scales = BITS[quantized.kind], quantized.data, quantized.scales
            found.append(self._matrix(bits, data, scales, joined_bias((layer,), torch.float32), layer.out_features))
        return found

    def _matrix(self, bits: int, data: Tensor, scales: Tensor | None, bias: Tensor | None, rows: int) -> Matrix:
        self._weights += [tensor for tensor in (data, scales, bias) if tensor is not None]
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in (data, scales, bias)]
        return Matrix(*addresses, rows, bits)

    def _buffer(self, name: str, width: int) -> Tensor:
        return self._workspace.buffer(name, self._tokens, width)


def _rows(layers: tuple[Any, ...], **members: Any) -> int:
    """Return the width of the results of a product: concatenated, or multiplied if there is a gate."""
    return sum(layer.out_features for layer in layers[: 1 if members.get("gated") else None])


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
    sizes = {(block.num_kv_heads, block.num_heads // block.num_kv_heads, block.head_dim) for block in model.blocks}
    return max(
        int(kernels.attention_partial(tokens, heads, groups, dim, _spans(tokens, heads, groups, threads)))
        for heads, groups, dim in sizes
        for tokens in range(1, max_tokens + 1)
    )
