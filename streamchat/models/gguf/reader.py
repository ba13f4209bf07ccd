"""Reads the header of a GGUF file in about a second, even with a vocabulary of hundreds of thousands of tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType
from transformers import modeling_gguf_pytorch_utils

LONG = 1_000
"""Lists of at least this length, such as vocabularies, are not part of a config."""


class Reader(gguf.GGUFReader):
    """`gguf.GGUFReader`, which reads arrays at once instead of value by value."""

    def __init__(self, path: Path) -> None:
        self._raw = memoryview(np.asarray(np.memmap(path, mode="r")).data)
        super().__init__(str(path))

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        start = int(orig_offs)
        if GGUFValueType(raw_type) != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = self._get(start, np.uint32), self._get(start + 4, np.uint64)
        item, length, at = GGUFValueType(kind[0]), int(count[0]), start + 12
        if self.byte_order != "I" or item == GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        if item == GGUFValueType.STRING:
            values, size = self._strings(at, length)
        else:
            whole = np.asarray(self._get(at, self.gguf_scalar_to_np[item], length))
            if len(whole) < length:
                raise ValueError("an array ends after the end of the file")
            values, size = [whole[i : i + 1] for i in range(length)], whole.nbytes
        return (
            12 + size,
            [kind, count, *values],
            list(range(2, 2 + length)),
            [GGUFValueType.ARRAY, item][: 1 + (length > 0)],
        )

    def _strings(self, start: int, count: int) -> tuple[list[Any], int]:
        """Return the bytes of `count` strings, and their size in the file."""
        raw, at, values = self._raw, start, []
        for _ in range(count):
            size = int.from_bytes(raw[at : at + 8], "little")
            values.append(np.frombuffer(raw, np.uint8, size, at + 8))
            at += 8 + size
        return values, at - start


class WithoutLists:
    """The fields and tensors of `reader` without lists such as the vocabulary, which a config does not need."""

    def __init__(self, reader: Reader) -> None:
        self.fields = {name: field for name, field in reader.fields.items() if len(field.data) < LONG}
        self.tensors = reader.tensors

    def get_field(self, key: str) -> Any:
        """Return a field, or None."""
        return self.fields.get(key)


@contextmanager
def shared(reader: Any) -> Iterator[None]:
    """Context manager: transformers gets `reader` when it opens the file again, and reads strings and names fast."""
    replaced: list[tuple[Any, str, Any]] = [
        (gguf, "GGUFReader", lambda *_, **__: reader),
        (gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
        (modeling_gguf_pytorch_utils, "_gguf_parse_value", _parsed),
    ]
    originals = [getattr(module, name) for module, name, _ in replaced]
    for module, name, value in replaced:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), original in zip(replaced, originals, strict=True):
            setattr(module, name, original)


_parse: Any = getattr(modeling_gguf_pytorch_utils, "_gguf_parse_value")  # noqa: B009 - it is private


def _parsed(value: Any, types: Any) -> Any:
    """Return a value as transformers parses it, but decode strings at once instead of byte by byte."""
    is_text = isinstance(types, list) and types[-1] == GGUFValueType.STRING
    return bytes(value).decode() if is_text else _parse(value, types)
