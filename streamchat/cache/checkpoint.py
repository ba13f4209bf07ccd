"""A cache snapshot that can be restored exactly, in this process or another one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from streamchat.base.errors import CacheError
from streamchat.cache.eviction.policy import Run
from streamchat.cache.form import Form
from streamchat.cache.layers.layer import StreamingLayer
from streamchat.cache.layers.recurrent import Plain, is_recurrent, recurrent_state, set_recurrent_state
from streamchat.cache.recompute import RecomputingCache
from streamchat.cache.streaming import StreamingCache


@dataclass(frozen=True)
class CacheCheckpoint:
    """Copies of the tensors, on the CPU, and the bookkeeping.

    It does not contain the ids: these are in the token log, at the indices `runs`.
    """

    tensors: dict[str, Tensor]
    """`{layer}.keys`, `.values` (batch, num_kv_heads, length, head_dim) in the cache's dtype, or codes; then also
    `{layer}.key_scales`, `.value_scales` (batch, num_kv_heads, length);
    `{layer}.original_keys`, `.original_values` in float32: moved sink and pinned tokens, unrotated;
    `{layer}.state.*` of recurrent layers."""
    bases: tuple[int, ...]
    """Absolute position of each layer's first slot; 0 for layers without tokens."""
    runs: tuple[Run, ...]
    """Token log indices of the cached tokens, in slot order."""
    next_index: int
    pins: tuple[Run, ...] = ()
    turn_starts: tuple[int, ...] = ()
    compressions: int = 0
    plain: dict[str, Plain] = field(default_factory=dict)
    """`{layer}.*`: flags and sizes of recurrent layers."""
    stale: bool = False
    """No tensors: a recompute cache awaiting its post-eviction refill."""
    form: Form | None = field(default=None, compare=False)
    """Identifies the contents; None for new contents."""

    @property
    def length(self) -> int:
        """Cached tokens."""
        return sum(stop - first for first, stop in self.runs)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def capture(cache: StreamingCache) -> CacheCheckpoint:
    """Return a checkpoint of the cache as it is now; O(cache budget)."""
    cache.discard_partial_forward()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Plain] = {}
    bases = []
    stale = isinstance(cache, RecomputingCache) and cache.stale
    for i, layer in enumerate(cache.layers):
        parts: dict[str, Tensor] = {}
        if isinstance(layer, StreamingLayer):
            parts |= {} if stale else layer.state()
        if is_recurrent(layer):
            states, values = recurrent_state(layer)
            parts |= {f"state.{path}": tensor for path, tensor in states.items()}
            plain |= {f"{i}.{path}": value for path, value in values.items()}
        bases.append(layer.base if isinstance(layer, StreamingLayer) else 0)
        with torch.inference_mode(False):
            for name, tensor in parts.items():
                tensors[f"{i}.{name}"] = tensor.detach().to("cpu", copy=True).contiguous()
    return CacheCheckpoint(
        tensors,
        tuple(bases),
        tuple(cache.ledger.runs),
        cache.ledger.next_index,
        cache.pins,
        tuple(cache.turn_starts),
        cache.compression_count,
        plain,
        stale,
        cache.form,
    )


def restore(cache: StreamingCache, checkpoint: CacheCheckpoint) -> None:
    """Restore `cache` to the state of `checkpoint`.

    New buffers are allocated on the device that computes the layer (`PositionFit.devices`); existing ones are reused.

    Args:
        cache: A cache of the same model; its budget may differ if the checkpoint's tokens fit. Keys and values are
            converted to its dtype; those of the same dtype are restored exactly.
        checkpoint: Not changed; it can be restored again.

    Raises:
        CacheError: The checkpoint does not fit, or is from another model. The cache is then empty.
    """
    fed_tokens, cache.fed_tokens = cache.fed_tokens, None  # the id history is kept across restore
    cache.reset()
    cache.fed_tokens = fed_tokens
    if len(checkpoint.bases) != len(cache.layers) or checkpoint.length > cache.cache_size:
        raise CacheError(
            f"a checkpoint of {checkpoint.length} tokens in {len(checkpoint.bases)} layers does not fit into a cache "
            f"of {cache.cache_size} in {len(cache.layers)}"
        )
    parts: list[dict[str, Tensor]] = [{} for _ in cache.layers]
    for path, tensor in checkpoint.tensors.items():
        layer_index, _, name = path.partition(".")
        parts[int(layer_index)][name] = tensor
    for i, (layer, device) in enumerate(zip(cache.layers, cache.fit.devices, strict=True)):
        if isinstance(layer, StreamingLayer) and not checkpoint.stale:
            layer.load(parts[i], checkpoint.bases[i], device)
            if (found := layer.length) != checkpoint.length:
                cache.reset()
                raise CacheError(f"layer {i} of the checkpoint has {found} tokens, not {checkpoint.length}")
        if is_recurrent(layer):
            states = {n.removeprefix("state."): t for n, t in parts[i].items() if n.startswith("state.")}
            values = {n.partition(".")[2]: v for n, v in checkpoint.plain.items() if n.partition(".")[0] == str(i)}
            set_recurrent_state(layer, states, values, device)
    cache.ledger.runs, cache.ledger.next_index = list(checkpoint.runs), checkpoint.next_index
    cache.pins, cache.turn_starts = checkpoint.pins, list(checkpoint.turn_starts)
    cache.compression_count = checkpoint.compressions
    if checkpoint.form is not None:
        cache.form = checkpoint.form
    if cache.fed_tokens is not None:
        cache.fed_tokens.truncate(checkpoint.next_index)
    if isinstance(cache, RecomputingCache):
        cache.stale = checkpoint.stale
