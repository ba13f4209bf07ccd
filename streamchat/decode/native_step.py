"""A decode step of compiled kernels: Python only passes the addresses of the caches and the tokens."""

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
from streamchat.decode.spec import ModelSpec
from streamchat.kernels.library import Kernels
from streamchat.kernels.operations import MAX_HEAD_DIM, MAX_QUERIES
from streamchat.quantization.linear import QuantizedLinear

QUANTIZED_TOKENS = 256
"""Maximum tokens per call, as many as a chunk of a prompt has; the workspace grows with it. The kernels multiply int4
weights with many tokens faster than PyTorch multiplies the model's own, and int8 weights faster than float32 ones."""
INT8_TOKENS = 32
"""The same for int8 weights of a bfloat16 model: PyTorch multiplies many tokens with bfloat16 weights faster."""
NATIVE_TOKENS = 8
"""The same for a model without quantized weights."""
MAX_PROGRAMS = 64
"""Programs kept for the numbers of tokens met last: one takes about 0.2 MB, and a few milliseconds to build."""


def kernels_support(model: ModelSpec) -> bool:
    """Return whether the kernels support every part of `model`."""
    for block in model.blocks:
        act = block.act
        tanh = getattr(act, "approximate", "none") != "none"
        if type(act).__name__ not in ACTIVATIONS or tanh or getattr(act, "act", functional.gelu) is not functional.gelu:
            return False
        groups, rest = divmod(block.num_heads, block.num_kv_heads)
        if rest or groups > MAX_QUERIES or block.head_dim > MAX_HEAD_DIM:
            return False
    plain = all(type(layer) in (nn.Linear, QuantizedLinear) for layer in model.linear_layers)
    return plain and model.dtype in (torch.bfloat16, torch.float32)


def _max_tokens(model: ModelSpec) -> int:
    """Return the maximum tokens per call for which the kernels beat transformers' forward on native weights."""
    if not all(isinstance(layer, QuantizedLinear) for layer in model.linear_layers):
        return NATIVE_TOKENS
    kinds = {layer.quantized.kind for layer in model.linear_layers if layer is not model.head}
    return INT8_TOKENS if "int8" in kinds and model.dtype == torch.bfloat16 else QUANTIZED_TOKENS


class CompiledStep:
    """(1, n) ids, (1, n) positions, the layers of the cache -> (1, n, vocabulary) float32 logits, or those of the last
    token if `last_only`. Appends to the layers. n is at most `max_tokens`.

    A lock serializes calls: they share one workspace.
    """

    def __init__(self, model: ModelSpec, kernels: Kernels) -> None:
        self._model, self._kernels = model, kernels
        self.max_tokens = _max_tokens(model)
        self._table: Any = model.embedding.weight
        self._empty = [
            torch.empty(1, block.num_kv_heads, 0, block.head_dim, dtype=model.dtype) for block in model.blocks
        ]
        self._lock = threading.Lock()
        self._programs: dict[tuple[int, bool, int], Program] = {}
        self._workspace: Workspace | None = None

    def __call__(
        self, ids: Tensor, positions: Tensor, layers: Sequence[StreamingLayer], last_only: bool = True
    ) -> Tensor:
        """Run the program.

        Raises:
            CacheError: The dtypes of cache and model differ.
        """
        with self._lock:
            tokens, threads = ids.shape[1], torch.get_num_threads()
            program = self.program(tokens, last_only, threads)
            program.hidden.copy_(functional.embedding(ids[0], self._table))
            cos, sin = self._model.rotary(program.hidden, positions)
            program.cos.copy_(cos[0])
            program.sin.copy_(sin[0])
            for attention, layer, empty in zip(program.attentions, layers, self._empty, strict=True):
                if not layer.is_initialized:
                    layer.lazy_initialization(empty, empty)
                cached = layer.length
                layer.reserve_slots(tokens)
                keys, values = layer.keys, layer.values
                assert keys is not None
                assert values is not None
                if keys.dtype != self._model.dtype:
                    raise CacheError(
                        f"a cache in {keys.dtype} cannot be continued by a model in {self._model.dtype}; reset it first"
                    )
                attention.keys, attention.values = keys.data_ptr(), values.data_ptr()
                attention.head_stride_bytes = keys.stride(1) * keys.element_size()
                attention.cached = cached
            logits = program.new_logits()
            self._kernels.run(program.operations, threads)
            return logits[None]

    def program(self, tokens: int, last_only: bool, threads: int) -> Program:
        """Return the program for `tokens` tokens; it is built at first use."""
        key = tokens, last_only or tokens == 1, threads
        program = self._programs.get(key)
        if program is None:
            with torch.inference_mode(False), torch.no_grad():  # usable in any mode later
                if self._workspace is None or any(threads != each for _, _, each in self._programs):
                    self._programs.clear()
                    self._workspace = Workspace(self._model, self._kernels, self.max_tokens, threads)
                if len(self._programs) >= MAX_PROGRAMS:
                    self._programs.pop(next(iter(self._programs)))
                program = self._programs[key] = Program(self._model, self._workspace, *key)
        return program
