"""A decode step as launches of Triton kernels: the operations of `streamchat.decode.operations`, one kernel each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from streamchat.cache.layers.codes import CacheDtype
from streamchat.cache.layers.storage import new_storage
from streamchat.decode import operations
from streamchat.decode.fused import kernels, tile_kernels
from streamchat.decode.fused.residuals import Residual, with_residuals
from streamchat.decode.fused.sizes import Sizes, power_of_two
from streamchat.decode.fused.weights import NativeWeights, TileWeights, read_weights
from streamchat.decode.operations import Row, hidden_row, lower
from streamchat.decode.spec import AttentionSpec, ModelSpec, NormSpec
from streamchat.decode.static import Inputs
from streamchat.decode.static_slots import Buffers, bits_of
from streamchat.kernels.operations import GELU, GELU_TANH, GROUP, NO_FUNCTION, RELU, RELU2, SILU, SOFTCAP, TILE

FUNCTIONS = {"": NO_FUNCTION, "silu": SILU, "gelu": GELU, "gelu_tanh": GELU_TANH, "relu": RELU, "relu2": RELU2}
ROUNDED = ("activated", "attended")
"""Rows in the model's dtype, as every program of the next product reads all of them; the others are float32."""
EMBED_BLOCK = 256


@dataclass
class Launch:
    """A kernel with its arguments; those that change from run to run are set before it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, **changing: Any) -> None:
        """Launch it."""
        self.kernel[self.grid](**self.arguments, **changing, **self.options)

    def compile(self, **changing: Any) -> None:
        """Compile it, or find it in Triton's cache."""
        self.kernel.warmup(**self.arguments, **changing, **self.options, grid=self.grid)


class FusedProgram:
    """The launches of one step for one token.

    Args:
        model: The model to compute; `supports(model)`.
        sizes: How the work is divided.
        operand: Dtype of the products of attention; None for that of the model, and bfloat16 for products with codes of
            values. An interpreter without 16-bit floats needs float32.
    """

    def __init__(self, model: ModelSpec, sizes: Sizes, operand: torch.dtype | None = None) -> None:
        self._model, self._sizes = model, sizes
        self._operand = operand or model.dtype
        self._shares = torch.float32 if self._operand == torch.float32 else torch.bfloat16
        self._table: Any = model.embedding.weight
        device: Any = self._table.device
        self._device: torch.device = device
        self._rows: dict[Row, Tensor] = {}
        self._partials: dict[int, Tensor] = {}
        self.launches: list[Launch] = []
        self.attentions: list[tuple[AttentionSpec, Launch]] = []
        self._embed()
        for operation, residual in with_residuals(lower(model)):
            if isinstance(operation, operations.Product):
                self._product(operation, residual)
            else:
                assert isinstance(operation, operations.Attend)
                self._attend(operation)
        heads = max((block.attention.num_kv_heads for block in model.blocks), default=1)
        self._arrivals = torch.zeros(heads, dtype=torch.int32, device=self._device)
        self.vocabulary = operations.result_width([model.head])

    def run(self, inputs: Inputs, buffers: Sequence[Buffers]) -> Tensor:
        """Compute one token: write a slot of each of `buffers`, return (1, 1, vocabulary) float32 logits."""
        logits = torch.empty(self.vocabulary, dtype=torch.float32, device=self._device)
        for launch, changing in self.calls(inputs, buffers, logits):
            launch.run(**changing)
        return logits.view(1, 1, -1)

    def compile(self, dtype: CacheDtype | None = None) -> None:
        """Compile all kernels; each that is not in Triton's cache takes a moment.

        Args:
            dtype: Of the cache, for which there may be codes; None for that of the model.
        """
        logits = torch.empty(self.vocabulary, dtype=torch.float32, device=self._device)
        buffers = [self._some_buffers(of, dtype or self._model.dtype) for of, _ in self.attentions]
        for launch, changing in self.calls(Inputs(self._device), buffers, logits):
            launch.compile(**changing)

    def calls(
        self, inputs: Inputs, buffers: Sequence[Buffers], logits: Tensor
    ) -> Iterator[tuple[Launch, dict[str, Any]]]:
        """Yield the launches in order, each with the arguments that change from run to run."""
        like = self._row(hidden_row(self._model))[None]
        angles = [tuple(each.reshape(-1) for each in rotary(like, inputs.positions)) for rotary in self._model.rotaries]
        changing: dict[int, dict[str, Any]] = {
            id(self.launches[0]): {"ids": inputs.ids},
            id(self.launches[-1]): {"out": logits},
        }
        for (of, launch), pair in zip(self.attentions, buffers, strict=True):
            changing[id(launch)] = self._attention_arguments(launch, of, pair, angles, inputs)
        for launch in self.launches:
            yield launch, changing.get(id(launch), {})

    def _some_buffers(self, of: AttentionSpec, dtype: CacheDtype) -> Buffers:
        """Return buffers that the compiler takes for those of a cache."""
        like = torch.empty(1, of.num_kv_heads, 0, of.head_dim, device=self._device)
        return new_storage(like, like, 16, dtype).buffers

    def _attention_arguments(
        self, launch: Launch, of: AttentionSpec, buffers: Buffers, angles: Sequence[Any], inputs: Inputs
    ) -> dict[str, Any]:
        keys, values = buffers[:2]
        scales = [each.view(torch.int16) for each in buffers[2:]]  # an interpreter may lack bfloat16
        if not all(each.is_contiguous() for each in buffers):
            raise ValueError(f"buffers with the strides {[each.stride() for each in buffers]} are not contiguous")
        heads, slots = keys.shape[1:3]
        splits = self._sizes.splits(heads, slots)
        cos, sin = (keys, keys) if of.rotary is None else angles[of.rotary]
        # in the kernel, a new key and value are two more rows of the queries until they are turned
        rows = launch.arguments["GROUP"] + (2 if scales else 0)
        group = max(16, power_of_two(rows))  # the least rows of a product on tensor cores
        dim = launch.arguments["PADDED_DIM"]
        size = heads * splits * group * (dim + 2)
        if size not in self._partials:
            self._partials[size] = torch.empty(size, dtype=torch.float32, device=self._device)
        launch.grid = heads, splits
        return {
            "keys": keys,
            "values": values,
            "key_scales": scales[0] if scales else keys,
            "value_scales": scales[1] if scales else values,
            "cos": cos,
            "sin": sin,
            "first_slot": inputs.start,
            "new_slot": inputs.slot,
            "partial": self._partials[size],
            "arrivals": self._arrivals,
            "head_stride": keys.stride(1),
            "value_head_stride": values.stride(1),
            "slots": slots,
            "splits": splits,
            "ROTARY": 0 if of.rotary is None else cos.shape[0],
            "PADDED_GROUP": group,
            "KEY_BITS": bits_of(keys.dtype),
            "VALUE_BITS": bits_of(values.dtype),
        }

    def _embed(self) -> None:
        row = hidden_row(self._model)
        arguments = {
            "table": self._table,
            "out": self._row(row),
            "columns": row.width,
            "stride": self._table.stride(0),
            "scale": float(self._model.embedding_scale),
            "BLOCK": EMBED_BLOCK,
        }
        self._append(kernels.embed, (-(-row.width // EMBED_BLOCK),), arguments, 4)

    def _product(self, of: operations.Product, residual: Residual | None) -> None:
        if isinstance(of.given, operations.Attend):
            given = operations.Input(self._attended(of.given.of))
        else:
            given = of.given
        weights = read_weights(of.layers, of.gated)
        rows = [*weights.rows, 0, 0]
        bias = _joined_bias(of.layers, self._device)
        x = self._row(given.x)
        arguments: dict[str, Any] = {
            "x": x,
            "added": self._row(given.added, x),
            "more": self._row(given.more, x),
            "sum_out": self._row(given.sum, x),
            "bias": x if bias is None else bias,
            "residual": self._row(residual.x if residual else None, x),
            "other": self._row(residual.other if residual else None, x),
            "columns": given.x.width,
            "stride": weights.stride,
            "second": weights.offsets[0],
            "third": weights.offsets[1],
            "rows": rows[0],
            "second_rows": rows[1],
            "third_rows": rows[2],
            "added_scale": float(given.added_scale),
            "softcap": float(of.softcap or 1.0),
            "residual_scale": float(residual.scale) if residual else 1.0,
            "MATRICES": 1 if of.gated else len(weights.rows),
            "HAS_ADDED": given.added is not None,
            "HAS_MORE": given.more is not None,
            "HAS_SUM": given.sum is not None,
            "HAS_BIAS": bias is not None,
            "FUNCTION": FUNCTIONS[of.function] if of.softcap is None else SOFTCAP,
            "GATED": of.gated,
            "RESIDUAL": residual is not None,
            "HAS_OTHER": residual is not None and residual.other is not None,
        }
        arguments |= _norm("norm", given.norm, x, "HAS_NORM_BIAS", "NORM", "eps")
        arguments |= _norm("added", given.added_norm, x, "HAS_ADDED_BIAS", "ADDED_NORM", "added_eps")
        if not of.is_head:
            arguments["out"] = self._row(residual.out if residual else of.out)
        self._append_product(weights, arguments)

    def _append_product(self, weights: NativeWeights | TileWeights, arguments: dict[str, Any]) -> None:
        is_gated, columns = arguments["GATED"], arguments["columns"]
        if isinstance(weights, TileWeights):
            kernel, block_rows = tile_kernels.multiply_tiles, TILE
            groups = self._sizes.groups(weights.layout.bits, columns // GROUP)
            arguments |= weights.arguments | {"GROUPS": groups}
        else:
            kernel = kernels.multiply
            all_rows = weights.rows[0] if is_gated else sum(weights.rows)
            block_rows, block = self._sizes.product(all_rows, columns, 2 if is_gated else 1)
            arguments |= {"weight": weights.first, "ROWS": block_rows, "BLOCK": block}
        programs = [-(-rows // block_rows) for rows in weights.rows]
        count = programs[0] if is_gated else sum(programs)
        self._append(kernel, (count,), arguments, self._sizes.product_warps)

    def _append(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], warps: int) -> Launch:
        overlap = self._sizes.overlap
        options = {"num_warps": warps} | ({"launch_pdl": True} if overlap else {})
        launch = Launch(kernel, grid, arguments | {"OVERLAP": overlap}, options)
        self.launches.append(launch)
        return launch

    def _attend(self, operation: operations.Attend) -> None:
        of, layout = operation.of, operation.of.layout
        dim, group = of.head_dim, of.num_heads // of.num_kv_heads
        qkv = self._row(operation.qkv)
        block, warps = self._sizes.attention(self._model.dtype.itemsize, dim)
        arguments: dict[str, Any] = {
            "qkv": qkv,
            "out": self._row(self._attended(of)),
            "num_heads": of.num_heads,
            "num_kv_heads": of.num_kv_heads,
            "query_stride": layout.query_group_stride * dim,
            "key_start": layout.key_start * dim,
            "key_stride": layout.key_stride * dim,
            "value_start": layout.value_start * dim,
            "value_stride": layout.value_stride * dim,
            "query_norm_stride": _norm_stride(of.q_norm, dim),
            "key_norm_stride": _norm_stride(of.k_norm, dim),
            "window": of.window or 0,
            "scale": float(of.scale),
            "softcap": float(of.softcap or 1.0),
            "clip": float(of.clip or 0.0),
            "COPIES": layout.copies,
            "GROUP": group,
            "DIM": dim,
            "PADDED_DIM": max(16, power_of_two(dim)),
            "INTERLEAVED": of.interleaved,
            "IS_WHOLE": of.q_norm is not None and of.q_norm.whole,
            "HAS_CLIP": of.clip is not None,
            "HAS_WINDOW": of.window is not None,
            "HAS_SOFTCAP": of.softcap is not None,
            "TURN": dim & -dim,
            "OPERAND": _triton_type(self._operand),
            "SHARES": _triton_type(self._shares),
            "BLOCK": block,
            "LEAST": max(1, self._sizes.least_slots // block),
            "STAGES": self._sizes.attention_stages,
        }
        arguments |= _norm("query", of.q_norm, qkv, "HAS_QUERY_BIAS", "QUERY_NORM", "query_eps")
        arguments |= _norm("key", of.k_norm, qkv, "HAS_KEY_BIAS", "KEY_NORM", "key_eps")
        launch = self._append(kernels.attend, (), arguments, warps)
        self.attentions.append((of, launch))

    def _attended(self, of: AttentionSpec) -> Row:
        return Row("attended", of.num_heads * of.head_dim)

    def _row(self, row: Row | None, default: Tensor | None = None) -> Tensor:
        """Return the memory of a row; `default`, which is not read, if there is none."""
        if row is None:
            assert default is not None
            return default
        if row not in self._rows:
            dtype = self._model.dtype if row.name in ROUNDED else torch.float32
            self._rows[row] = torch.zeros(row.width, dtype=dtype, device=self._device)
        return self._rows[row]


def _norm(name: str, norm: NormSpec | None, unused: Tensor, has_bias: str, kind: str, eps: str) -> dict[str, Any]:
    """Return the arguments of a norm."""
    bias = None if norm is None else norm.bias
    return {
        f"{name}_weight": unused if norm is None else norm.weight,
        f"{name}_bias": unused if bias is None else bias,
        has_bias: bias is not None,
        kind: 0 if norm is None else 2 if norm.is_layer_norm else 1,
        eps: 0.0 if norm is None else float(norm.eps),
    }


def _norm_stride(norm: NormSpec | None, head_dim: int) -> int:
    """Return the distance of the weights of a head from those of the previous one."""
    return 0 if norm is None or norm.weight.shape == (head_dim,) else head_dim


def _joined_bias(layers: Sequence[Any], device: torch.device) -> Tensor | None:
    """Return the biases of `layers`, (sum of rows,) float32; None if no layer has one."""
    if all(layer.bias is None for layer in layers):
        return None
    parts = [torch.zeros(each.out_features, device=device) if each.bias is None else each.bias for each in layers]
    return torch.cat([part.detach().float() for part in parts])


def _triton_type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]
