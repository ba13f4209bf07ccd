"""The storage for the keys and values of a layer's slots: numbers in one dtype, or codes with scales.

Checkpoints and evicted tokens copy raw slots: a dict with one tensor per part, `keys`, `values`, and for codes their
scales, each (batch, num_kv_heads, slots, ...).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from streamchat.cache.layers.codes import (
    BITS,
    INT4,
    K8V4,
    CacheDtype,
    dequantize,
    key_and_value_dtype,
    quantize,
    states_of,
)

Raw = dict[str, Tensor]
"""Parts of some slots, in the format of the storage."""
PARTS = ("key", "value")
"""Start of the names of a layer's raw slots."""


def head_dim(slots: Tensor) -> int:
    """Return the numbers of a head, which is stored as numbers or codes (..., width)."""
    return slots.shape[-1] * (2 if slots.dtype == torch.uint8 else 1)


class TensorStorage(ABC):
    """The keys or the values of all slots of a layer."""

    searches = False
    """Whether a head is stored with the best of several scales, see `quantize`."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(batch, num_kv_heads, head_dim)."""
        slots = self.parts[""]
        return slots.shape[0], slots.shape[1], head_dim(slots)

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """A float dtype, or `torch.int8` or `torch.int4` for codes."""

    @property
    @abstractmethod
    def parts(self) -> Raw:
        """The allocated tensors, (batch, num_kv_heads, slots, ...) each; the main one is called ''."""

    @abstractmethod
    def encode(self, x: Tensor) -> Raw:
        """Return states (..., n, head_dim) of any float dtype as parts (..., n, ...), which are copied to slots."""

    @abstractmethod
    def decode(self, raw: Mapping[str, Tensor]) -> Tensor:
        """Return the states (..., n, head_dim) of parts (..., n, ...)."""

    def write(self, first: int, x: Tensor) -> None:
        """Store states (batch, num_kv_heads, n, head_dim) of any float dtype in slots from `first` on."""
        parts = self.parts
        for name, part in self.encode(x).items():
            parts[name].narrow(2, first, x.shape[2]).copy_(part)

    def read(self, first: int, count: int) -> Tensor:
        """Return the states of `count` slots."""
        return self.decode(self.raw(first, count))

    @abstractmethod
    def write_raw(self, first: int, raw: Mapping[str, Tensor]) -> None:
        """Store raw slots: exactly if they have this format, else converted."""

    @abstractmethod
    def select(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Replace every part by `pick(part)`, which selects rows of the batch."""

    @abstractmethod
    def replace_not_finite(self) -> None:
        """Replace NaN and infinities by 0, also in free slots."""

    def raw(self, first: int, count: int) -> Raw:
        """Return views of the parts of `count` slots."""
        return {name: part.narrow(2, first, count) for name, part in self.parts.items()}

    def move_to_front(self, start: int, count: int) -> None:
        """Move `count` slots from `start` to the front, in blocks that do not overlap their source."""
        for part in self.parts.values():
            for at in range(0, count, start):
                size = min(start, count - at)
                part[:, :, at : at + size] = part[:, :, at + start : at + start + size]


class NumberStorage(TensorStorage):
    """Numbers (batch, num_kv_heads, slots, head_dim) in one dtype.

    Args:
        like: States (batch, num_kv_heads, any, head_dim); their device is used.
        slots: Number of slots to allocate.
        dtype: The dtype of the numbers.
    """

    def __init__(self, like: Tensor, slots: int, dtype: torch.dtype) -> None:
        batch, heads, _, dim = like.shape
        self.numbers = torch.zeros(batch, heads, slots, dim, dtype=dtype, device=like.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the numbers."""
        return self.numbers.dtype

    @property
    def parts(self) -> Raw:
        """The numbers."""
        return {"": self.numbers}

    def encode(self, x: Tensor) -> Raw:
        """Return the states; the copy to slots converts them."""
        return {"": x}

    def decode(self, raw: Mapping[str, Tensor]) -> Tensor:
        """Return the states in the stored dtype, as a view."""
        return raw[""]

    def write_raw(self, first: int, raw: Mapping[str, Tensor]) -> None:
        """Store raw slots; those of other formats are converted."""
        self.write(first, states_of(raw).to(self.numbers.device))

    def select(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Replace the numbers by `pick(numbers)`."""
        self.numbers = pick(self.numbers)

    def replace_not_finite(self) -> None:
        """Replace NaN and infinities by 0, also in free slots."""
        self.numbers.nan_to_num_(0.0, 0.0, 0.0)


class CodeStorage(TensorStorage):
    """The keys or the values of all slots of a layer, as codes and scales.

    Args:
        like: States (batch, num_kv_heads, any, head_dim); their device is used.
        slots: Number of slots to allocate.
        bits: 8 or 4. 4 needs an even head_dim.
        searches: Store each head with the best of several scales, see `quantize`.
    """

    def __init__(self, like: Tensor, slots: int, bits: int, searches: bool = False) -> None:
        batch, heads, _, dim = like.shape
        self.bits, self.searches = bits, searches
        width, dtype = (dim, torch.int8) if bits == 8 else (dim // 2, torch.uint8)
        self.codes = torch.zeros(batch, heads, slots, width, dtype=dtype, device=like.device)
        self.scales = torch.zeros(batch, heads, slots, dtype=torch.bfloat16, device=like.device)

    @property
    def dtype(self) -> torch.dtype:
        """`torch.int8` or `torch.int4`."""
        return torch.int8 if self.bits == 8 else INT4

    @property
    def parts(self) -> Raw:
        """Codes ('') and scales ('scales')."""
        return {"": self.codes, "scales": self.scales}

    def encode(self, x: Tensor) -> Raw:
        """Return the codes and scales of states."""
        codes, scales = quantize(x, self.bits, searches=self.searches)
        return {"": codes, "scales": scales}

    def decode(self, raw: Mapping[str, Tensor]) -> Tensor:
        """Return the states in float32."""
        return dequantize(raw[""], raw["scales"])

    def write_raw(self, first: int, raw: Mapping[str, Tensor]) -> None:
        """Store raw slots: exactly if they have this format, else quantized again."""
        if "scales" not in raw or raw[""].dtype != self.codes.dtype:
            return self.write(first, states_of(raw).to(self.codes.device))
        for name, part in self.parts.items():
            part.narrow(2, first, raw[name].shape[2]).copy_(raw[name])
        return None

    def select(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Replace every part by `pick(part)`, which selects rows of the batch."""
        self.codes, self.scales = pick(self.codes), pick(self.scales)

    def replace_not_finite(self) -> None:
        """Replace NaN and infinities by 0, also in free slots."""
        self.scales.nan_to_num_(0.0, 0.0, 0.0)


class LayerStorage:
    """Keys and values of the slots of a layer."""

    def __init__(self, keys: TensorStorage, values: TensorStorage) -> None:
        self.keys, self.values = keys, values

    @property
    def both(self) -> tuple[TensorStorage, TensorStorage]:
        """Keys and values."""
        return self.keys, self.values

    @property
    def dtype(self) -> CacheDtype:
        """How keys and values are stored: a float dtype, `torch.int8` or `torch.int4` for codes, or two of these."""
        pair = (self.keys.dtype, self.values.dtype)
        return pair if pair[0] != pair[1] else pair[0]

    @property
    def batch(self) -> int:
        """Number of rows of the batch."""
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
    def buffers(self) -> tuple[Tensor, ...]:
        """Keys and values; if they are codes, followed by the scales of both."""
        both = [each.parts for each in self.both]
        return *(each[""] for each in both), *(each["scales"] for each in both if "scales" in each)

    @property
    def nbytes(self) -> int:
        """Bytes of the allocated tensors."""
        return sum(part.untyped_storage().nbytes() for part in self.parts)

    @property
    def token_bytes(self) -> int:
        """Bytes per slot."""
        return sum(part.nbytes // part.shape[2] for part in self.parts)

    def write(self, first: int, keys: Tensor, values: Tensor) -> None:
        """Store states (batch, num_kv_heads, n, head_dim) in slots from `first` on."""
        self.keys.write(first, keys)
        self.values.write(first, values)

    def raw(self, first: int, count: int) -> Raw:
        """Return views of the parts of `count` slots: `keys`, `values`, and `key_*` and `value_*` if there are more."""
        return _named("key", self.keys.raw(first, count)) | _named("value", self.values.raw(first, count))

    def write_raw(self, first: int, raw: Mapping[str, Tensor]) -> int:
        """Store raw slots of this or another storage from slot `first` on; return their number."""
        self.keys.write_raw(first, parts_of("key", raw))
        self.values.write_raw(first, parts_of("value", raw))
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


def parts_of(name: str, raw: Mapping[str, Tensor]) -> Raw:
    """Return the parts of `key` or `value` in the raw slots of a layer."""
    prefix = f"{name}_"
    more = {part.removeprefix(prefix): tensor for part, tensor in raw.items() if part.startswith(prefix)}
    return {"": raw[f"{name}s"]} | more


def new_storage(keys: Tensor, values: Tensor, slots: int, dtype: CacheDtype) -> LayerStorage:
    """Return storage for states like these, (batch, num_kv_heads, any, head_dim).

    Args:
        keys: Key states; only their shape and device matter.
        values: Value states.
        slots: Slots to allocate.
        dtype: How to store them: a float dtype, `torch.int8` or `torch.int4` for codes, or one of these for each.
    """

    of_keys, of_values = key_and_value_dtype(dtype)

    def stored(like: Tensor, dtype: torch.dtype) -> TensorStorage:
        if dtype not in BITS:
            return NumberStorage(like, slots, dtype)
        return CodeStorage(like, slots, BITS[dtype], searches=(of_keys, of_values) == K8V4 and dtype == INT4)

    with torch.inference_mode(False):  # usable outside inference mode later
        return LayerStorage(stored(keys, of_keys), stored(values, of_values))


def states_like(raw: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return empty keys and values, (batch, num_kv_heads, 0, head_dim), of the shapes of these raw slots."""
    none = {name: part[:, :, :0] for name, part in raw.items()}
    return states_of(parts_of("key", none)), states_of(parts_of("value", none))
