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
from streamchat.kernels.operations import GELU, SILU, Activation, Attention, Norm, Product, program
from streamchat.quantization.linear import QuantizedLinear, joined_bias, quantized_together
from streamchat.quantization.weights import BITS, QuantizedWeight

ACTIVATIONS = {"SiLU": SILU, "SiLUActivation": SILU, "GELU": GELU, "GELUActivation": GELU}


class Workspace:
    """Memory that all programs of a model share, one at a time; its size does not depend on the length of the text.

    Args:
        model: Determines the sizes.
        kernels: Report the scratch memory they need.
        max_tokens: Maximum tokens of a program.
        threads: Maximum threads that run a program.
    """

    def __init__(self, model: ModelSpec, kernels: Kernels, max_tokens: int, threads: int) -> None:
        self._max_tokens = max_tokens
        self._buffers: dict[tuple[str, int, bool], Tensor] = {}
        self.scratch = torch.zeros(_scratch_size(model, kernels, max_tokens, threads))

    def buffer(self, name: str, rows: int, width: int) -> Tensor:
        """Return (rows, width) float32; the same memory for the same name and width."""
        key = name, width, rows == 1
        if key not in self._buffers:
            self._buffers[key] = torch.zeros(1 if rows == 1 else self._max_tokens, width)
        return self._buffers[key][:rows]


class Program:
    """The operations for a fixed number of tokens.

    Fill `hidden`, `cos` and `sin`, point `attentions` to the caches and run `operations`; this sets `logits`.

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
        self._operations: list[ctypes.Structure] = []
        self._scratch = workspace.scratch
        table: Any = model.embedding.weight
        width: int = table.shape[1]
        self.hidden = self._buffer("hidden", width)
        """(tokens, hidden): the embeddings."""
        cos, _ = model.rotary(self.hidden, torch.zeros(1, 1, dtype=torch.long))
        self.cos, self.sin = (self._buffer(name, cos.shape[-1]) for name in ("cos", "sin"))
        """(tokens, rotary_dim) each."""
        self._normed, self._attn_out, self._mlp_out = (
            self._buffer(name, width) for name in ("normed", "attn_out", "mlp_out")
        )
        added: tuple[Tensor, ...] = ()
        for block in model.blocks:
            added = self._block(block, added)
        self._norm(model.norm, self.hidden, self._normed, added)
        self.logits = self._product("logits", (model.head,), self._normed[-1:] if last_only else self._normed)
        """(tokens, vocabulary); (1, vocabulary) if `last_only`."""
        self.operations = program(self._operations)
        at = [i for i, each in enumerate(self._operations) if isinstance(each, Attention)]
        self.attentions = [
            [self.operations[i].each.attention for i in at[first : first + tokens]]
            for first in range(0, len(at), tokens)
        ]
        """Per layer and token; the caller sets `keys`, `values`, `head_stride_bytes` and `cached`."""

    def _block(self, block: BlockSpec, added: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Append the operations of a block; `added` and the return value are residuals not yet added."""
        self._norm(block.input_norm, self.hidden, self._normed, added)
        qkv = self._product("qkv", block.qkv_proj, self._normed)
        out = self._buffer("heads", block.num_heads * block.head_dim)
        for token in range(self._tokens):
            self._attention(block, qkv[token].view(-1, block.head_dim), out, token)
        self._product("attn_out", (block.o_proj,), out)
        pending = () if block.parallel_residual else (self._attn_out,)
        self._norm(block.post_attention_norm, self.hidden, self._normed, pending)
        gate_up = self._product("gate_up", block.up_proj, self._normed)
        size = gate_up.shape[1] // len(block.up_proj)
        activated = self._buffer("activated", size)
        activation = Activation(
            x=gate_up.data_ptr(),
            up=gate_up[:, size:].data_ptr() if len(block.up_proj) == 2 else None,
            out=activated.data_ptr(),
            width=size,
            stride=gate_up.shape[1],
            rows=self._tokens,
            function=ACTIVATIONS[type(block.act).__name__],
        )
        self._operations.append(activation)
        self._product("mlp_out", (block.down_proj,), activated)
        return (self._attn_out, self._mlp_out) if block.parallel_residual else (self._mlp_out,)

    def _attention(self, block: BlockSpec, qkv: Tensor, out: Tensor, token: int) -> None:
        """Append the attention of one token, which also attends to the tokens before it. `qkv`: (heads, head_dim)."""
        if block.qkv_by_head:
            query, key, value, stride = qkv, qkv[1:], qkv[2:], 3 * block.head_dim
        else:
            query, key, stride = qkv, qkv[block.num_heads :], block.head_dim
            value = key[block.num_kv_heads :]
        for norm, part, rows in ((block.q_norm, query, block.num_heads), (block.k_norm, key, block.num_kv_heads)):
            if norm is not None:
                self._norm(norm, part, part, rows=rows)
        attention = Attention(
            query=query.data_ptr(),
            key=key.data_ptr(),
            value=value.data_ptr(),
            cos=self.cos[token].data_ptr(),
            sin=self.sin[token].data_ptr(),
            out=out[token].data_ptr(),
            scratch=self._scratch.data_ptr(),
            query_stride=stride,
            key_stride=stride,
            rotary_dim=self.cos.shape[1],
            num_kv_heads=block.num_kv_heads,
            num_kv_groups=block.num_heads // block.num_kv_heads,
            head_dim=block.head_dim,
            element_bytes=self._model.dtype.itemsize,
            spans=self._threads,
            scale=block.scale,
        )
        self._operations.append(attention)

    def _norm(
        self, norm: NormSpec, x: Tensor, out: Tensor, added: tuple[Tensor, ...] = (), rows: int | None = None
    ) -> None:
        first, second = (*added, None, None)[:2]
        operation = Norm(
            hidden=x.data_ptr(),
            added=None if first is None else first.data_ptr(),
            more=None if second is None else second.data_ptr(),
            weight=norm.weight.data_ptr(),
            bias=None if norm.bias is None else norm.bias.data_ptr(),
            out=out.data_ptr(),
            width=norm.weight.shape[0],
            rows=self._tokens if rows is None else rows,
            is_layer_norm=int(norm.is_layer_norm),
            eps=norm.eps,
        )
        self._operations.append(operation)

    def _product(self, name: str, layers: tuple[Any, ...], x: Tensor) -> Tensor:
        """Append the products of `x` (n, in) with `layers`; returns their outputs, concatenated: (n, sum of out)."""
        out = self._workspace.buffer(name, x.shape[0], sum(layer.out_features for layer in layers))
        whole = quantized_together(layers)
        if whole is not None:
            self._append_product(layers, whole, x, out)
            return out
        first = 0
        for layer in layers:
            to = out[:, first : first + layer.out_features]
            self._append_product((layer,), layer.quantized if isinstance(layer, QuantizedLinear) else None, x, to)
            first += layer.out_features
        return out

    def _append_product(
        self, layers: tuple[Any, ...], quantized: QuantizedWeight | None, x: Tensor, out: Tensor
    ) -> None:
        """Append one product with the `quantized` weights of all `layers`, or with the own ones of a single layer."""
        if quantized is None:
            data, scales = layers[0].weight.detach().contiguous(), None
            bits = 8 * data.element_size()
        else:
            data, scales, bits = quantized.data, quantized.scales, BITS[quantized.kind]
        bias = joined_bias(layers, torch.float32)
        product = Product(
            data=data.data_ptr(),
            scales=None if scales is None else scales.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            x=x.data_ptr(),
            out=out.data_ptr(),
            scratch=self._scratch.data_ptr(),
            rows=out.shape[1],
            columns=x.shape[1],
            out_stride=out.stride(0),
            bits=bits,
            count=x.shape[0],
        )
        self._weights += [tensor for tensor in (data, scales, bias) if tensor is not None]
        self._operations.append(product)

    def _buffer(self, name: str, width: int) -> Tensor:
        return self._workspace.buffer(name, self._tokens, width)


def _scratch_size(model: ModelSpec, kernels: Kernels, tokens: int, threads: int) -> int:
    """Scratch size in floats: maximum over operations."""
    sizes: list[int] = [tokens * kernels.product_scratch(layer.in_features) for layer in model.linear_layers]
    for block in model.blocks:
        groups = block.num_heads // block.num_kv_heads
        sizes.append(kernels.attention_scratch(block.num_kv_heads, groups, block.head_dim, threads))
    return max(sizes)
