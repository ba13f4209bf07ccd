"""Where a layer keeps the keys and values of its slots.

Whoever moves raw slots (checkpoints, evicted tokens) uses a dict of tensors, one per part: `keys` and `values`, each
(batch, num_kv_heads, slots, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Raw = dict[str, Tensor]
"""Parts of some slots, in the format of the storage."""


class NumberStorage:
    """One tensor of a layer, keys or values: (batch, num_kv_heads, slots, head_dim) numbers in one dtype.

    Args:
        like: States (batch, num_kv_heads, any, head_dim); their device is used.
        slots: Number of slots to allocate.
        dtype: The dtype of the numbers.
    """

    def __init__(self, like: Tensor, slots: int, dtype: torch.dtype) -> None:
        batch, heads, _, dim = like.shape
        self.numbers = torch.zeros(batch, heads, slots, dim, dtype=dtype, device=like.device)

    @property
    def parts(self) -> dict[str, Tensor]:
        """The allocated tensors, (batch, num_kv_heads, slots, ...) each; the main one is called ''."""
        return {"": self.numbers}

    def write(self, first: int, x: Tensor) -> None:
        """Store states (batch, num_kv_heads, n, head_dim) of any float dtype in slots from `first` on."""
        self.numbers.narrow(2, first, x.shape[-2]).copy_(x)

    def read(self, first: int, count: int) -> Tensor:
        """Return the states of `count` slots in the stored dtype, as a view."""
        return self.numbers.narrow(2, first, count)

    def write_raw(self, first: int, raw: Mapping[str, Tensor]) -> None:
        """Store raw slots, also those of another format."""
        self.write(first, raw[""].to(self.numbers.device))

    def raw(self, first: int, count: int) -> Raw:
        """Return views of the parts of `count` slots."""
        return {name: part.narrow(2, first, count) for name, part in self.parts.items()}

    def select(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Replace every part by `pick(part)`, which selects rows of the batch."""
        self.numbers = pick(self.numbers)

    def move_to_front(self, start: int, count: int) -> None:
        """Move `count` slots from `start` to the front, in blocks that do not overlap their source."""
        for part in self.parts.values():
            for at in range(0, count, start):
                size = min(start, count - at)
                part[:, :, at : at + size] = part[:, :, at + start : at + start + size]

    def replace_not_finite(self) -> None:
        """Replace NaN and infinities by 0, also in free slots."""
        self.numbers.nan_to_num_(0.0, 0.0, 0.0)


class LayerStorage:
    """Keys and values of the slots of a layer."""

    def __init__(self, keys: NumberStorage, values: NumberStorage) -> None:
        self.keys, self.values = keys, values

    @property
    def both(self) -> tuple[NumberStorage, NumberStorage]:
        """Keys and values."""
        return self.keys, self.values

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return self.keys.parts[""].shape[0]

    @property
    def device(self) -> torch.device:
        """The device of the slots."""
        return self.keys.parts[""].device

    @property
    def parts(self) -> list[Tensor]:
        """All allocated tensors."""
        return [part for each in self.both for part in each.parts.values()]

    @property
    def nbytes(self) -> int:
        """Bytes of the allocated tensors."""
        return sum(part.untyped_storage().nbytes() for part in self.parts)

    @property
    def token_bytes(self) -> int:
        """Bytes per slot."""
        return sum(part.element_size() * part[:, :, 0].numel() for part in self.parts)

    def write(self, first: int, keys: Tensor, values: Tensor) -> None:
        """Store states (batch, num_kv_heads, n, head_dim) in slots from `first` on."""
        self.keys.write(first, keys)
        self.values.write(first, values)

    def raw(self, first: int, count: int) -> Raw:
        """Return views of the parts of `count` slots: `keys`, `values`, and `key_*` and `value_*` if there are more."""
        return _named("key", self.keys.raw(first, count)) | _named("value", self.values.raw(first, count))

    def write_raw(self, first: int, raw: Mapping[str, Tensor]) -> int:
        """Store raw slots of this or another storage from slot `first` on; return their number."""
        self.keys.write_raw(first, _unnamed("key", raw))
        self.values.write_raw(first, _unnamed("value", raw))
        return raw["keys"].shape[2]

    def select(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Replace every part by `pick(part)`, which selects rows of the batch."""
        for each in self.both:
            each.select(pick)

    def move_to_front(self, start: int, count: int) -> None:
        """Move `count` slots from `start` to the front."""
        for each in self.both:
            each.move_to_front(start, count)

    def replace_not_finite(self) -> None:
        """Replace NaN and infinities by 0, also in free slots."""
        for each in self.both:
            each.replace_not_finite()


def _named(name: str, parts: Mapping[str, Tensor]) -> Raw:
    return {f"{name}_{part}" if part else f"{name}s": tensor for part, tensor in parts.items()}


def _unnamed(name: str, raw: Mapping[str, Tensor]) -> Raw:
    prefix = f"{name}_"
    more = {part.removeprefix(prefix): tensor for part, tensor in raw.items() if part.startswith(prefix)}
    return {"": raw[f"{name}s"]} | more


def new_storage(keys: Tensor, values: Tensor, slots: int, dtype: torch.dtype) -> LayerStorage:
    """Return storage for states like these, (batch, num_kv_heads, any, head_dim).

    Args:
        keys: Key states; only their shape and device matter.
        values: Value states.
        slots: Slots to allocate.
        dtype: How to store them.
    """
    with torch.inference_mode(False):  # usable outside inference mode later
        return LayerStorage(NumberStorage(keys, slots, dtype), NumberStorage(values, slots, dtype))
