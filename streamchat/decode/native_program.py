"""A decode step as a program of compiled kernels, for a fixed number of tokens, and the memory that it works in.

Between the weights and the cache, which are in the model's number formats, all is float32.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from streamchat.decode.spec import BlockOf, ModelOf, NormOf
from streamchat.kernels.library import Kernels
from streamchat.kernels.operations import GELU, SILU, Activation, Attention, Norm, Product, program
from streamchat.quantization.linear import PackedLinear
from streamchat.quantization.weights import BITS, PackedWeight

ACTIVATIONS = {"SiLU": SILU, "SiLUActivation": SILU, "GELU": GELU, "GELUActivation": GELU}


class Workspace:
    """The memory that all programs of a model work in, one at a time: constant, however many tokens are read.

    Args:
        model: Its sizes count.
        kernels: Know their scratch memory.
        most: Tokens that a program may have.
        threads: Most threads that may run it.
    """

    def __init__(self, model: ModelOf, kernels: Kernels, most: int, threads: int) -> None:
        self._most = most
        self._rooms: dict[tuple[str, int, bool], Tensor] = {}
        self.scratch = torch.zeros(_scratch_size(model, kernels, most, threads))

    def room(self, name: str, rows: int, width: int) -> Tensor:
        """(rows, width) float32; the same memory for the same name and width."""
        key = name, width, rows == 1
        if key not in self._rooms:
            self._rooms[key] = torch.zeros(1 if rows == 1 else self._most, width)
        return self._rooms[key][:rows]


class Program:
    """What is fixed for a number of tokens. Fill `hidden`, `cos` and `sin`, point `attentions` to the caches, and run
    `operations`; then `logits` are there.

    Args:
        model: What it computes.
        workspace: Of that model.
        tokens: Read at once.
        last_only: Logits are wanted for the last token alone.
        threads: That will run it.
    """

    def __init__(self, model: ModelOf, workspace: Workspace, tokens: int, last_only: bool, threads: int) -> None:
        self._model, self._tokens, self._threads, self._workspace = model, tokens, threads, workspace
        self._kept: list[Tensor] = []
        """Weights that the operations point to."""
        self._made: list[ctypes.Structure] = []
        self._scratch = workspace.scratch
        table: Any = model.embedding.weight
        width: int = table.shape[1]
        self.hidden = self._room("hidden", width)
        """(tokens, hidden): the embeddings."""
        cos, _ = model.rotary(self.hidden, torch.zeros(1, 1, dtype=torch.long))
        self.cos, self.sin = (self._room(name, cos.shape[-1]) for name in ("cos", "sin"))
        """(tokens, rotated dimensions) each."""
        self._normed, self._attended, self._narrowed = (
            self._room(name, width) for name in ("normed", "attended", "narrowed")
        )
        added: tuple[Tensor, ...] = ()
        for block in model.blocks:
            added = self._block(block, added)
        self._norm(model.norm, self.hidden, self._normed, added)
        self.logits = self._product("logits", (model.head,), self._normed[-1:] if last_only else self._normed)
        """(tokens, or 1 where `last_only`, vocabulary)."""
        self.operations = program(self._made)
        at = [i for i, each in enumerate(self._made) if isinstance(each, Attention)]
        self.attentions = [
            [self.operations[i].each.attention for i in at[first : first + tokens]]
            for first in range(0, len(at), tokens)
        ]
        """For each layer, for each token: `keys`, `values`, `head_bytes` and `held` are to be set."""

    def _block(self, block: BlockOf, added: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Append the operations of a block; `added` and what is returned wait to be added to the hidden state."""
        self._norm(block.before, self.hidden, self._normed, added)
        qkv = self._product("qkv", block.read, self._normed)
        out = self._room("heads", block.heads * block.dim)
        for token in range(self._tokens):
            self._attention(block, qkv[token].view(-1, block.dim), out, token)
        self._product("attended", (block.write,), out)
        self._norm(block.between, self.hidden, self._normed, () if block.parallel else (self._attended,))
        wide = self._product("wide", block.widen, self._normed)
        size = wide.shape[1] // len(block.widen)
        acted = self._room("acted", size)
        activation = Activation(
            x=wide.data_ptr(),
            up=wide[:, size:].data_ptr() if len(block.widen) == 2 else None,
            out=acted.data_ptr(),
            width=size,
            step=wide.shape[1],
            rows=self._tokens,
            function=ACTIVATIONS[type(block.act).__name__],
        )
        self._made.append(activation)
        self._product("narrowed", (block.narrow,), acted)
        return (self._attended, self._narrowed) if block.parallel else (self._narrowed,)

    def _attention(self, block: BlockOf, qkv: Tensor, out: Tensor, token: int) -> None:
        """Of one token: it sees those before it, which were stored by then. `qkv`: (heads, dim)."""
        if block.by_head:
            query, key, value, step = qkv, qkv[1:], qkv[2:], 3 * block.dim
        else:
            query, key, step = qkv, qkv[block.heads :], block.dim
            value = key[block.kv_heads :]
        for norm, part, rows in ((block.q_norm, query, block.heads), (block.k_norm, key, block.kv_heads)):
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
            query_step=step,
            key_step=step,
            width=self.cos.shape[1],
            heads=block.kv_heads,
            queries=block.heads // block.kv_heads,
            dim=block.dim,
            bytes=self._model.dtype.itemsize,
            spans=self._threads,
            scale=block.scale,
        )
        self._made.append(attention)

    def _norm(
        self, norm: NormOf, x: Tensor, out: Tensor, added: tuple[Tensor, ...] = (), rows: int | None = None
    ) -> None:
        first, second = (*added, None, None)[:2]
        made = Norm(
            hidden=x.data_ptr(),
            added=None if first is None else first.data_ptr(),
            more=None if second is None else second.data_ptr(),
            weight=norm.weight.data_ptr(),
            bias=None if norm.bias is None else norm.bias.data_ptr(),
            out=out.data_ptr(),
            width=norm.weight.shape[0],
            rows=self._tokens if rows is None else rows,
            centred=int(norm.centred),
            eps=norm.eps,
        )
        self._made.append(made)

    def _product(self, name: str, layers: tuple[Any, ...], x: Tensor) -> Tensor:
        """Append the products of `x` (n, in) with `layers`; what they give, side by side: (n, sum of out)."""
        out = self._workspace.room(name, x.shape[0], sum(layer.out_features for layer in layers))
        whole = _packed_together(layers)
        if whole is not None:
            self._append_product(BITS[whole.kind], whole.data, whole.scales, _bias(layers), x, out)
            return out
        first = 0
        for layer in layers:
            to = out[:, first : first + layer.out_features]
            packed = layer.packed if isinstance(layer, PackedLinear) else None
            if packed is None:
                weight = layer.weight.detach().contiguous()
                self._append_product(8 * weight.element_size(), weight, None, _bias((layer,)), x, to)
            else:
                self._append_product(BITS[packed.kind], packed.data, packed.scales, _bias((layer,)), x, to)
            first += layer.out_features
        return out

    def _append_product(
        self, bits: int, data: Tensor, scales: Tensor | None, bias: Tensor | None, x: Tensor, out: Tensor
    ) -> None:
        product = Product(
            data=data.data_ptr(),
            scales=None if scales is None else scales.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            x=x.data_ptr(),
            out=out.data_ptr(),
            scratch=self._scratch.data_ptr(),
            rows=out.shape[1],
            columns=x.shape[1],
            out_step=out.stride(0),
            bits=bits,
            count=x.shape[0],
        )
        self._kept += [tensor for tensor in (data, scales, bias) if tensor is not None]
        self._made.append(product)

    def _room(self, name: str, width: int) -> Tensor:
        return self._workspace.room(name, self._tokens, width)


def _scratch_size(model: ModelOf, kernels: Kernels, tokens: int, threads: int) -> int:
    """Floats that the greediest operation works in; one runs at a time."""
    sizes: list[int] = [tokens * kernels.product_scratch(model.head.in_features)]
    for block in model.blocks:
        queries = block.heads // block.kv_heads
        sizes.append(kernels.attention_scratch(block.kv_heads, queries, block.dim, threads))
        layers: tuple[Any, ...] = (*block.read, block.write, *block.widen, block.narrow)
        sizes += [tokens * kernels.product_scratch(layer.in_features) for layer in layers]
    return max(sizes)


def _packed_together(layers: tuple[Any, ...]) -> PackedWeight | None:
    """The one matrix that all of `layers` are parts of, in this order."""
    if not all(isinstance(layer, PackedLinear) for layer in layers):
        return None
    whole: PackedWeight = layers[0].whole
    return whole if all(layer.whole is whole for layer in layers) else None


def _bias(layers: tuple[Any, ...]) -> Tensor | None:
    """(sum of out_features,) float32; None where none has one."""
    if all(layer.bias is None for layer in layers):
        return None
    rows = [torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach().float() for layer in layers]
    return torch.cat(rows)
