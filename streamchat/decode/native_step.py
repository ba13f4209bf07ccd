"""A decode step by compiled kernels: Python only says where the caches are and which tokens they get."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamchat.base.errors import CacheError
from streamchat.cache.layers.layer import StreamingLayer
from streamchat.decode.native_program import ACTIVATIONS, Program, Workspace
from streamchat.decode.spec import ModelOf
from streamchat.kernels.library import Kernels
from streamchat.kernels.operations import MAX_HEAD_DIM, MAX_QUERIES
from streamchat.quantization.linear import PackedLinear

PACKED_TOKENS = 32
"""At once, up to which the kernels read packed weights faster than a forward of transformers its own."""
NATIVE_TOKENS = 8
"""The same for a model that is not packed."""


def compiles(model: ModelOf) -> bool:
    """Whether the kernels serve all of `model`."""
    for block in model.blocks:
        act = block.act
        tanh = getattr(act, "approximate", "none") != "none"
        if type(act).__name__ not in ACTIVATIONS or tanh or getattr(act, "act", functional.gelu) is not functional.gelu:
            return False
        queries, rest = divmod(block.heads, block.kv_heads)
        if rest or queries > MAX_QUERIES or block.dim > MAX_HEAD_DIM:
            return False
    plain = all(type(layer) in (nn.Linear, PackedLinear) for layer in _layers(model))
    return plain and model.dtype in (torch.bfloat16, torch.float32)


def _layers(model: ModelOf) -> list[Any]:
    layers: list[Any] = [model.head]
    for block in model.blocks:
        layers += [*block.read, block.write, *block.widen, block.narrow]
    return layers


class CompiledStep:
    """(1, n) ids, (1, n) positions, the layers of the cache -> (1, n, vocabulary) float32 logits, of the last token
    alone where `last_only`. Appends to the layers. n is up to `most`.

    One call at a time: it works in memory of its own.
    """

    def __init__(self, model: ModelOf, kernels: Kernels) -> None:
        self._model, self._kernels = model, kernels
        packed = all(isinstance(layer, PackedLinear) for layer in _layers(model))
        self.most = PACKED_TOKENS if packed else NATIVE_TOKENS
        self._table: Any = model.embedding.weight
        self._empty = [torch.empty(1, block.kv_heads, 0, block.dim, dtype=model.dtype) for block in model.blocks]
        self._lock = threading.Lock()
        self._programs: dict[tuple[int, bool, int], Program] = {}
        self._workspace: Workspace | None = None

    def __call__(
        self, ids: Tensor, positions: Tensor, layers: Sequence[StreamingLayer], last_only: bool = True
    ) -> Tensor:
        """Run the program.

        Raises:
            CacheError: The cache is in another number format than the model.
        """
        with self._lock:
            tokens, threads = ids.shape[1], torch.get_num_threads()
            program = self.program(tokens, last_only, threads)
            program.hidden.copy_(functional.embedding(ids[0], self._table))
            cos, sin = self._model.rotary(program.hidden, positions)
            program.cos.copy_(cos[0])
            program.sin.copy_(sin[0])
            for attentions, layer, empty in zip(program.attentions, layers, self._empty, strict=True):
                if not layer.is_initialized:
                    layer.lazy_initialization(empty, empty)
                held = layer.length
                layer.claim(tokens)
                keys, values = layer.keys, layer.values
                assert keys is not None
                assert values is not None
                if keys.dtype != self._model.dtype:
                    raise CacheError(
                        f"a cache in {keys.dtype} cannot go on with a model in {self._model.dtype}; reset it"
                    )
                first_key, first_value = keys.data_ptr(), values.data_ptr()
                head_bytes = keys.stride(1) * keys.element_size()
                for attention in attentions:
                    attention.keys, attention.values, attention.head_bytes = first_key, first_value, head_bytes
                    attention.held = held
                    held += 1
            self._kernels.run(program.operations, len(program.operations), threads)
            return program.logits[None].clone()

    def program(self, tokens: int, last_only: bool, threads: int) -> Program:
        """The program for so many tokens, made at its first use."""
        key = tokens, last_only or tokens == 1, threads
        found = self._programs.get(key)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():  # usable in any mode later
                if self._workspace is None or any(threads != each for _, _, each in self._programs):
                    self._programs.clear()
                    self._workspace = Workspace(self._model, self._kernels, self.most, threads)
                found = self._programs[key] = Program(self._model, self._workspace, *key)
        return found
