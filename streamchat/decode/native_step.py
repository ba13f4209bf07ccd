"""A decode step of compiled kernels: Python only passes the addresses of the caches and the tokens."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from streamchat.base.errors import CacheError
from streamchat.cache.layers.codes import INT4 as INT4_DTYPE
from streamchat.cache.layers.codes import K8V4 as K8V4_DTYPE
from streamchat.cache.layers.layer import StreamingLayer
from streamchat.cache.layers.storage import CodeStorage
from streamchat.decode.native_program import FUNCTIONS, Program, Workspace
from streamchat.decode.spec import BlockSpec, ExpertsSpec, MlpSpec, ModelSpec
from streamchat.kernels.library import Kernels
from streamchat.kernels.operations import INT4, INT8, K8V4, MAX_HEAD_DIM, TILE, Attention
from streamchat.quantization.linear import QuantizedLinear, is_linear
from streamchat.quantization.unpack import FORMATS

QUANTIZED_TOKENS = 256
"""Maximum tokens per call with quantized weights: the size of a chunk of a prompt. The workspace grows with it. The
kernels prefill the default model at least as fast as transformers' forward pass does with native weights."""
NATIVE_TOKENS = 8
"""Maximum tokens per call with native weights."""
CACHE_FORMATS: dict[Any, int] = {**FORMATS, torch.int8: INT8, INT4_DTYPE: INT4, K8V4_DTYPE: K8V4}
"""Dtypes of a cache -> formats of the kernels."""
MAX_PROGRAMS = 64
"""Maximum programs to keep: one takes about 0.2 MB, and a few milliseconds to build."""


def kernels_support(model: ModelSpec) -> bool:
    """Return whether the kernels support every part of `model`."""
    plain = all(map(_has_known_weights, model.linear_layers))
    scaled_bias = model.logit_scale != 1 and model.head.bias is not None
    return plain and not scaled_bias and model.dtype in FORMATS and all(map(_supports, model.blocks))


def _has_known_weights(layer: Any) -> bool:
    """Return whether the kernels know the layout of the weights; those packed for PyTorch's kernels have another."""
    return layer.quantized.tiled if isinstance(layer, QuantizedLinear) else is_linear(layer)


def _supports(block: BlockSpec) -> bool:
    attention = block.attention
    if not (_supports_experts(block.mlp) if isinstance(block.mlp, ExpertsSpec) else _supports_mlp(block.mlp)):
        return False
    if attention.num_heads % attention.num_kv_heads or attention.head_dim > MAX_HEAD_DIM:
        return False
    if attention.clip is not None and attention.q_norm is not None and attention.q_norm.whole:
        return False  # the norm would need the clipped values of all heads
    return not (block.parallel and (block.attention_out_norm or block.mlp_out_norm))


def _supports_mlp(mlp: MlpSpec) -> bool:
    return mlp.act in FUNCTIONS and not (mlp.fused and not _halves_are_tiles(mlp.up_proj[0]))


def _supports_experts(experts: ExpertsSpec) -> bool:
    if experts.act not in FUNCTIONS or not (experts.shared is None or _supports_mlp(experts.shared)):
        return False
    if experts.shared_gate is not None and experts.shared_gate.bias is not None:
        return False
    quantized = experts.quantized
    return quantized is None or (all(each.tiled for each in quantized.wholes) and experts.down.shape[-1] % TILE == 0)


def _halves_are_tiles(layer: Any) -> bool:
    """Return whether both halves of the rows of a layer are matrices of their own."""
    rows: int = layer.out_features
    return rows % (2 * TILE if isinstance(layer, QuantizedLinear) else 2) == 0


def _max_tokens(model: ModelSpec) -> int:
    """Return the maximum tokens per call for which the kernels beat transformers' forward pass on native weights."""
    is_quantized = all(isinstance(layer, QuantizedLinear) or layer.out_features == 1 for layer in model.linear_layers)
    is_quantized &= all(experts.quantized is not None for experts in model.experts)
    return QUANTIZED_TOKENS if is_quantized else NATIVE_TOKENS


def _point_to(attention: Attention, layer: StreamingLayer) -> None:
    """Let `attention` read and write the slots of `layer`.

    Raises:
        CacheError: The kernels do not support their format, or they have other heads.
    """
    keys, values, storage, dtype = layer.keys, layer.values, layer.storage, layer.stored_dtype
    assert keys is not None
    assert values is not None
    assert storage is not None
    if dtype not in CACHE_FORMATS:
        raise CacheError(f"the compiled kernels do not support a cache in {dtype}; reset it first")
    dim = 2 * keys.shape[3] if dtype == INT4_DTYPE else keys.shape[3]
    if keys.shape[1] != attention.num_kv_heads or dim != attention.head_dim:
        raise CacheError(
            f"a cache with {keys.shape[1]} key heads of {dim} cannot be continued by a model with "
            f"{attention.num_kv_heads} of {attention.head_dim}; reset it first"
        )
    attention.format = CACHE_FORMATS[dtype]
    attention.keys, attention.values = keys.data_ptr(), values.data_ptr()
    attention.head_stride_bytes = keys.stride(1) * keys.element_size()
    if isinstance(storage.keys, CodeStorage) and isinstance(storage.values, CodeStorage):
        of_keys, of_values = storage.keys.scales, storage.values.scales
        at = layer.start * of_keys.element_size()  # no view: this runs for each layer and token
        attention.key_scales, attention.value_scales = of_keys.data_ptr() + at, of_values.data_ptr() + at
        attention.scale_stride = of_keys.stride(1)


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
            torch.empty(1, block.attention.num_kv_heads, 0, block.attention.head_dim, dtype=model.dtype)
            for block in model.blocks
        ]
        self._lock = threading.Lock()
        self._programs: dict[tuple[int, bool, int], Program] = {}
        self._workspace: Workspace | None = None

    def __call__(
        self, ids: Tensor, positions: Tensor, layers: Sequence[StreamingLayer], last_only: bool = True
    ) -> Tensor:
        """Run the program.

        Raises:
            CacheError: The cache has a dtype that the kernels do not support, or other heads than the model.
        """
        with self._lock:
            tokens, threads = ids.shape[1], torch.get_num_threads()
            program = self.program(tokens, last_only, threads)
            program.hidden.copy_(functional.embedding(ids[0], self._table))
            if self._model.embedding_scale != 1:
                program.hidden.mul_(self._model.embedding_scale)
            for rotary, buffers in zip(self._model.rotaries, program.angles, strict=True):
                for buffer, found in zip(buffers, rotary(program.hidden, positions), strict=True):
                    buffer.copy_(found[0])
            for attention, layer, empty in zip(program.attentions, layers, self._empty, strict=True):
                if not layer.is_initialized:
                    layer.lazy_initialization(empty, empty)
                attention.cached = layer.length
                layer.reserve_slots(tokens)
                _point_to(attention, layer)
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
