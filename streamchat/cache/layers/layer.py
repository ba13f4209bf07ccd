"""A cache layer with preallocated buffers: appends at the end, evicts by moving the start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from streamchat.base.errors import CacheError
from streamchat.cache.layers.codes import CacheDtype, key_and_value_dtype
from streamchat.cache.layers.mover import TORCH, Move, Mover
from streamchat.cache.layers.storage import LayerStorage, TensorStorage, new_storage, states_like
from streamchat.cache.positions.rotation import TensorRotation, difference


@dataclass(frozen=True)
class LayerRotation:
    """How the two tensors of a layer carry positions; None for a tensor without positions."""

    keys: TensorRotation | None = None
    values: TensorRotation | None = None


def _refuse_tensors(value: Tensor | None) -> None:
    """transformers sets the attributes of a new layer to None; anything else would have no effect."""
    if value is not None:
        raise CacheError("keys and values of a streaming layer cannot be replaced; call its methods instead")


class StreamingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Slots `[start, end)` of the buffers are [prefix | window]; slot `start + i` has absolute position `base + i`.

    An eviction moves the prefix (sinks and pinned tokens) forward to just before the window; the window stays where it
    is, in memory and in position (see docs/how-it-works.md). `keys` and `values` are views
    (batch, num_kv_heads, length, head_dim) of the buffers, as in a `DynamicCache`; quantized ones are codes.

    Args:
        cache_size: The budget in tokens.
        rotation: How keys and values carry positions.
        dtype: The dtype of the buffers, or `torch.int8` or `torch.int4` for codes with scales; a pair for keys and
            values; None for that of the states.
    """

    is_sliding = False

    def __init__(self, cache_size: int, rotation: LayerRotation, dtype: CacheDtype | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache_size = cache_size
        self.rotation = rotation
        self._buffer_dtype = dtype
        self.slots = cache_size + max(16, cache_size // 4)
        self.start = self.end = self.base = 0
        self.storage: LayerStorage | None = None
        """The slots; None before the first token. It is replaced only if the batch changes."""
        # Unrotated float32 copies of the first tokens. Rotating step by step in the cache's dtype would accumulate
        # rounding errors: 70 % in bfloat16 after 1,000 evictions, instead of 0.2 % after any number.
        self._originals: tuple[Tensor, Tensor] | None = None
        self.mover: Mover = TORCH
        """Moves its tokens to other positions; the same for all layers of a cache."""
        self.written = 0
        """Slots at the front whose contents are exactly their originals, moved to where they are."""

    @property
    def keys(self) -> Tensor | None:
        """A view of the cached keys; None before the first token. It is made anew each time: most tokens need none."""
        return None if self.storage is None else self._view(self.storage.keys)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        _refuse_tensors(value)

    @property
    def values(self) -> Tensor | None:
        """The same of the values."""
        return None if self.storage is None else self._view(self.storage.values)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        _refuse_tensors(value)

    def _view(self, of: TensorStorage) -> Tensor:
        return of.parts[""].narrow(2, self.start, self.end - self.start)

    # --- DynamicLayer -----------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers for (batch, num_kv_heads, new tokens, head_dim) states."""
        dtype = self._buffer_dtype or key_states.dtype
        self.dtype, self.device = key_and_value_dtype(dtype)[0], key_states.device
        self.storage = new_storage(key_states, value_states, self.slots, dtype)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (batch, num_kv_heads, n, head_dim) states; returns all keys and values of the layer.

        These are views of the buffers, or copies if the states have another dtype than the buffers: a forward holds one
        layer's copies at a time.

        Raises:
            CacheError: The budget would be exceeded (no `StreamingHook` is attached to make room), or the batch size
                differs from that of the cache.
        """
        batch, _, count, _ = key_states.shape
        if self.storage is None or (self.length == 0 and self.storage.batch != batch):
            self.lazy_initialization(key_states, value_states)
        assert self.storage is not None
        if self.storage.batch != batch:
            raise CacheError(
                f"a batch of {batch} cannot continue a cache with a batch of {self.storage.batch}; reset the cache "
                "first"
            )
        first = self.reserve_slots(count)
        self.storage.write(first, key_states, value_states)
        keys, values = (each.read(self.start, self.length).to(key_states.dtype) for each in self.storage.both)
        return keys, values

    def reserve_slots(self, count: int) -> int:
        """Extend the layer by `count` slots for the caller to write; returns the first of them.

        Raises:
            CacheError: The budget would be exceeded.
        """
        if self.length + count > self.cache_size:
            raise CacheError(
                f"{count} new tokens and {self.length} cached ones exceed cache_size = {self.cache_size}; run the "
                "model under a StreamingHook, which evicts before each forward"
            )
        if self.end + count > self.slots:
            self._move_to_front()
        first = self.end
        self.end += count
        return first

    def get_seq_length(self) -> int:
        """Return the number of cached tokens (not of all tokens fed)."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Crop: negative = number of tokens to drop, positive = length to keep (as in transformers < 5.17)."""
        if tokens_to_remove < 0:
            self.truncate(self.length + tokens_to_remove)
        elif tokens_to_remove > 0:
            self.truncate(min(self.length, tokens_to_remove))

    def reset(self) -> None:
        """Empty the layer; the buffers stay allocated."""
        self.start = self.end = self.base = self.written = 0
        self._originals = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch for beam search."""
        self._select(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat the cache in the batch dimension."""
        self._select(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        self._select(lambda x: x[indices.to(x.device), ...])

    # --- checkpoints ------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Return views of the raw slots, and of the `original_*` tensors if there are any; {} if empty."""
        if self.length == 0:
            return {}
        assert self.storage is not None
        state = self.storage.raw(self.start, self.length)
        if self._originals is not None:
            state |= {"original_keys": self._originals[0], "original_values": self._originals[1]}
        return state

    def load(self, state: Mapping[str, Tensor], base: int, device: torch.device) -> None:
        """Load copies of a `state()`, from absolute position `base` on, into an empty layer.

        Existing buffers are used; new ones are allocated on `device`. Keys and values are converted to the buffers'
        dtype; of the same dtype, they are copied exactly.
        """
        if "keys" not in state:
            return
        if self.storage is None or self.storage.batch != state["keys"].shape[0]:
            keys, values = states_like(state)
            self.lazy_initialization(keys.to(device), values.to(device))
        assert self.storage is not None
        with torch.inference_mode(False), torch.no_grad():
            length = self.storage.write_raw(0, state)
            if "original_keys" in state:
                originals = (state["original_keys"], state["original_values"])
                moved = [tensor.to(self.storage.device, copy=True) for tensor in originals]
                self._originals = moved[0], moved[1]
        self.start, self.end, self.base, self.written = 0, length, base, 0

    # --- streaming --------------------------------------------------------------------------------------------

    @property
    def length(self) -> int:
        """Cached tokens."""
        return self.end - self.start

    @property
    def next_position(self) -> int:
        """Absolute position of the next token."""
        return self.base + self.length

    @property
    def stored_dtype(self) -> CacheDtype | None:
        """How keys and values are stored, see `LayerStorage.dtype`; None before the first token."""
        return None if self.storage is None else self.storage.dtype

    @property
    def storage_bytes(self) -> int:
        """Bytes of the allocated buffers, independent of the length."""
        return 0 if self.storage is None else self.storage.nbytes

    @property
    def token_bytes(self) -> int:
        """Bytes per token."""
        return 0 if self.storage is None else self.storage.token_bytes

    @property
    def buffers(self) -> tuple[Tensor, ...] | None:
        """Keys and values, (batch, num_kv_heads, slots, head_dim) each; None before the first token.

        Quantized ones are codes, followed by the scales of both, (batch, num_kv_heads, slots) each. They are replaced
        only if the batch changes.
        """
        return None if self.storage is None else self.storage.buffers

    def open_slot(self, count: int = 1, *, front: bool = False) -> int:
        """Return the slot of the next token, for callers that write to the buffers directly.

        Follow with `reserve_slots`.

        Args:
            count: Slots that are needed; fewer are free behind the returned one only if the whole buffers have fewer.
            front: Move the used slots to the front of the buffers even if their end is not reached.
        """
        if self.start and (front or self.end + count > self.slots):
            self._move_to_front()
        return self.end

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens."""
        self.end = self.start + max(0, length)
        self.written = min(self.written, self.length)
        self._forget_originals(self.length)
        if self.length == 0:
            self.start = self.end = self.base = 0

    def drop_slots(self, at: int, count: int) -> None:
        """Drop `count` slots from slot `at` on. The caller then writes those before them, see `write_fronts`."""
        self._drop_originals(at, count)
        self.start += count
        self.base += count

    def replace_not_finite(self) -> None:
        """Replace NaN and infinities in the buffers by 0, also in free slots."""
        if self.storage is not None:
            self.storage.replace_not_finite()

    def move_window(self, to: int) -> None:
        """Move the slots without originals to the positions that they have if slot 0 is at `to`. O(length)."""
        assert self.storage is not None
        prefix = self.num_originals
        count = self.length - prefix
        device = self.storage.device
        for stored, rotation in zip(self.storage.both, (self.rotation.keys, self.rotation.values), strict=True):
            if rotation is None or count == 0:
                continue
            first = self.start + prefix
            new = rotation.source.angles_range(to + prefix, count, device)
            old = rotation.source.angles_range(self.base + prefix, count, device)
            stored.write(first, rotation.apply(stored.read(first, count), difference(new, old)))
        self.base = to

    @property
    def num_originals(self) -> int:
        """Number of slots at the front that have originals: unrotated float32 copies."""
        return 0 if self._originals is None else self._originals[0].shape[2]

    def originals(self, part: int) -> Tensor:
        """Return the originals of the keys (0) or of the values (1), (batch, num_kv_heads, n, head_dim)."""
        assert self._originals is not None
        return self._originals[part]

    def add_originals(self, keys: Tensor, values: Tensor) -> None:
        """Append originals for the next slots."""
        known = [] if self._originals is None else [self._originals]
        joined = [torch.cat(column, dim=2) for column in zip(*known, (keys, values), strict=True)]
        self._originals = joined[0], joined[1]

    def new_originals(self, part: int, count: int) -> Tensor:
        """Return an uninitialized tensor for the originals of `count` keys (0) or values (1)."""
        assert self.storage is not None
        batch, heads, dim = self.storage.both[part].shape
        return torch.empty(batch, heads, count, dim, dtype=torch.float32, device=self.storage.device)

    def move(self, part: int, first: int, originals: Tensor) -> Move:
        """Return the move between the keys (0) or values (1) from slot `first` on and their originals."""
        assert self.storage is not None
        stored = self.storage.both[part]
        rotation = self.rotation.values if part else self.rotation.keys
        slots = stored.raw(self.start + first, originals.shape[2])
        return Move(slots, originals, rotation, self.base + first, stored.searches)

    def unrotated_keys(self, first: int, stop: int) -> Tensor:
        """Return the keys of slots `[first, stop)`, (batch, num_kv_heads, stop - first, head_dim) in float32.

        Rotary positions are undone. Positions that a model adds to its input (learned tables) remain in the keys.
        """
        keys = self.new_originals(0, stop - first)
        self.mover.read_slots([self.move(0, first, keys)])
        return keys

    def _drop_originals(self, at: int, count: int) -> None:
        """Drop the copies of `count` slots from slot `at` on; those of later slots stay right, rotated or not."""
        if self._originals is not None and self.num_originals > at:
            k, v = (torch.cat([x[:, :, :at], x[:, :, at + count :]], dim=2) for x in self._originals)
            self._originals = (k, v) if k.shape[2] else None

    def _forget_originals(self, prefix: int) -> None:
        """Drop the copies of tokens after the first `prefix`, which were removed."""
        if self._originals is not None and self.num_originals > prefix:
            k, v = self._originals
            self._originals = (k[:, :, :prefix], v[:, :, :prefix]) if prefix else None

    def _move_to_front(self) -> None:
        """Move the used slots to the start of the buffers."""
        assert self.storage is not None
        self.storage.move_to_front(self.start, self.length)
        self.start, self.end = 0, self.length

    def _select(self, pick: Any) -> None:
        if self.storage is not None:
            with torch.inference_mode(False):
                self.storage.select(pick)
            if self._originals is not None:
                self._originals = pick(self._originals[0]), pick(self._originals[1])
