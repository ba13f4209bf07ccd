"""A decode step as one program of compiled kernels: Python only says where the caches are and which token it is.

Between the weights and the cache, which are in the model's number formats, all is float32.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamchat.cache.layer import StreamingLayer
from streamchat.errors import CacheError
from streamchat.kernels.library import Kernels
from streamchat.kernels.operations import (
    GELU,
    MAX_HEAD_DIM,
    MAX_QUERIES,
    SILU,
    Activation,
    Attention,
    Norm,
    Product,
    program,
)
from streamchat.speed.families import BlockOf, ModelOf, NormOf
from streamchat.speed.linear import PackedLinear
from streamchat.speed.packed import BITS, PackedWeight

ACTIVATIONS = {"SiLU": SILU, "SiLUActivation": SILU, "GELU": GELU, "GELUActivation": GELU}


def compiles(model: ModelOf) -> bool:
    """Whether the kernels serve all of `model`."""
    layers: list[Any] = [model.head]
    for block in model.blocks:
        layers += [*block.read, block.write, *block.widen, block.narrow]
        act = block.act
        tanh = getattr(act, "approximate", "none") != "none"
        if type(act).__name__ not in ACTIVATIONS or tanh or getattr(act, "act", functional.gelu) is not functional.gelu:
            return False
        queries, rest = divmod(block.heads, block.kv_heads)
        if rest or queries > MAX_QUERIES or block.dim > MAX_HEAD_DIM:
            return False
    plain = all(type(layer) in (nn.Linear, PackedLinear) for layer in layers)
    return plain and model.dtype in (torch.bfloat16, torch.float32)


class CompiledStep:
    """(1, 1) id, (1, 1) position, the layers of the cache -> (1, 1, vocabulary) float32 logits. Appends to the layers.

    One call at a time: it works in memory of its own.
    """

    def __init__(self, model: ModelOf, kernels: Kernels) -> None:
        self._model, self._kernels = model, kernels
        self._lock = threading.Lock()
        self._threads = 0

    def __call__(self, ids: Tensor, positions: Tensor, layers: Sequence[StreamingLayer]) -> Tensor:
        """Run the program."""
        with self._lock:
            threads = torch.get_num_threads()
            if threads != self._threads:
                with torch.inference_mode(False), torch.no_grad():  # usable in any mode later
                    self._build(threads)
            self._hidden.copy_(functional.embedding(ids.view(-1), self._table).view(-1))
            cos, sin = self._model.rotary(self._hidden, positions)
            self._cos.copy_(cos.view(-1))
            self._sin.copy_(sin.view(-1))
            for attention, layer, empty in zip(self._attentions, layers, self._empty, strict=True):
                if not layer.is_initialized:
                    layer.lazy_initialization(empty, empty)
                attention.held = layer.length
                layer.claim(1)
                keys, values = layer.keys, layer.values
                assert keys is not None
                assert values is not None
                if keys.dtype != self._model.dtype:
                    raise CacheError(
                        f"a cache in {keys.dtype} cannot go on with a model in {self._model.dtype}; reset it"
                    )
                attention.keys, attention.values = keys.data_ptr(), values.data_ptr()
                attention.head_bytes = keys.stride(1) * keys.element_size()
            self._kernels.run(self._program, len(self._program), threads)
            return self._logits.view(1, 1, -1).clone()

    # --- building ---------------------------------------------------------------------------------------------

    def _build(self, threads: int) -> None:
        """The program and the memory it works in. `_kept` holds all that it points to."""
        model = self._model
        self._kept: list[Tensor] = []
        self._operations: list[ctypes.Structure] = []
        self._scratch = self._room(self._scratch_size(threads))
        self._table = next(model.embedding.parameters())
        width = self._table.shape[1]
        self._hidden = self._room(width)
        cos, _ = model.rotary(self._hidden, torch.zeros(1, 1, dtype=torch.long))
        self._cos, self._sin = self._room(cos.shape[-1]), self._room(cos.shape[-1])
        self._normed, self._attended, self._narrowed = (self._room(width) for _ in range(3))
        added: tuple[Tensor, ...] = ()
        for block in model.blocks:
            added = self._block(block, added, threads)
        self._norm(model.norm, self._hidden, self._normed, added)
        self._logits = self._product((model.head,), self._normed)
        made = program(self._operations)
        self._program = made
        at = [i for i, each in enumerate(self._operations) if isinstance(each, Attention)]
        self._attentions = [made[i].each.attention for i in at]
        self._empty = [torch.empty(1, b.kv_heads, 0, b.dim, dtype=model.dtype) for b in model.blocks]
        self._threads = threads

    def _block(self, block: BlockOf, added: tuple[Tensor, ...], threads: int) -> tuple[Tensor, ...]:
        """Append the operations of a block; `added` and what is returned wait to be added to the hidden state."""
        self._norm(block.before, self._hidden, self._normed, added)
        qkv = self._product(block.read, self._normed).view(-1, block.dim)
        if block.by_head:
            query, key, value, step = qkv[0:], qkv[1:], qkv[2:], 3 * block.dim
        else:
            key, step = qkv[block.heads :], block.dim
            query, value = qkv, key[block.kv_heads :]
        for norm, part, rows in ((block.q_norm, query, block.heads), (block.k_norm, key, block.kv_heads)):
            if norm is not None:
                self._norm(norm, part, part, rows=rows)
        out = self._room(block.heads * block.dim)
        attention = Attention(
            query=query.data_ptr(),
            key=key.data_ptr(),
            value=value.data_ptr(),
            cos=self._cos.data_ptr(),
            sin=self._sin.data_ptr(),
            out=out.data_ptr(),
            scratch=self._scratch.data_ptr(),
            query_step=step,
            key_step=step,
            width=self._cos.shape[0],
            heads=block.kv_heads,
            queries=block.heads // block.kv_heads,
            dim=block.dim,
            bytes=self._model.dtype.itemsize,
            spans=threads,
            scale=block.scale,
        )
        self._operations.append(attention)
        self._product((block.write,), out, self._attended)
        self._norm(block.between, self._hidden, self._normed, () if block.parallel else (self._attended,))
        wide = self._product(block.widen, self._normed)
        size = wide.shape[0] // len(block.widen)
        acted = self._room(size)
        activation = Activation(
            x=wide.data_ptr(),
            up=wide[size:].data_ptr() if len(block.widen) == 2 else None,
            out=acted.data_ptr(),
            width=size,
            function=ACTIVATIONS[type(block.act).__name__],
        )
        self._operations.append(activation)
        self._product((block.narrow,), acted, self._narrowed)
        return (self._attended, self._narrowed) if block.parallel else (self._narrowed,)

    def _norm(self, norm: NormOf, x: Tensor, out: Tensor, added: tuple[Tensor, ...] = (), rows: int = 1) -> None:
        first, second = (*added, None, None)[:2]
        made = Norm(
            hidden=x.data_ptr(),
            added=None if first is None else first.data_ptr(),
            more=None if second is None else second.data_ptr(),
            weight=norm.weight.data_ptr(),
            bias=None if norm.bias is None else norm.bias.data_ptr(),
            out=out.data_ptr(),
            width=norm.weight.shape[0],
            rows=rows,
            centred=int(norm.centred),
            eps=norm.eps,
        )
        self._operations.append(made)

    def _product(self, layers: tuple[Any, ...], x: Tensor, out: Tensor | None = None) -> Tensor:
        """Append the products of `x` with `layers`; what they give, side by side."""
        size = sum(layer.out_features for layer in layers)
        if out is None:
            out = self._room(size)
        whole = _packed_together(layers)
        if whole is not None:
            self._append_product(BITS[whole.kind], whole.data, whole.scales, _bias(layers), x, out)
            return out
        first = 0
        for layer in layers:
            to = out[first : first + layer.out_features]
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
            rows=out.shape[0],
            columns=x.shape[0],
            bits=bits,
            count=1,
        )
        self._kept += [tensor for tensor in (data, scales, bias) if tensor is not None]
        self._operations.append(product)

    def _room(self, size: int) -> Tensor:
        made = torch.zeros(size)
        self._kept.append(made)
        return made

    def _scratch_size(self, threads: int) -> int:
        """Floats that the greediest operation works in; one runs at a time."""
        sizes = [0]
        for block in self._model.blocks:
            queries = block.heads // block.kv_heads
            sizes.append(self._kernels.attention_scratch(block.kv_heads, queries, block.dim, threads))
            layers: tuple[Any, ...] = (*block.read, block.write, *block.widen, block.narrow)
            sizes += [self._kernels.product_scratch(layer.in_features) for layer in layers]
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
