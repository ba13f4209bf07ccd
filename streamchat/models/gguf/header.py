"""Reads scalars and strings of the metadata of a GGUF file, without torch, numpy or the tensors."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type number of GGUF -> format of `struct`."""
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)
MAX_COUNT = 1 << 32
"""Limit of lengths and counts: a larger one means that the file is damaged."""


class HeaderError(ValueError):
    """The metadata are not those of a GGUF file."""


class _Metadata:
    """A position in the metadata. All numbers are little-endian."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self.at = data, 8  # after magic and version

    def number(self, form: str) -> Any:
        value = struct.unpack_from(f"<{form}", self._data, self.at)[0]
        self.at += struct.calcsize(f"<{form}")
        return value

    def count(self) -> int:
        count: int = self.number("Q")
        if count > MAX_COUNT:
            raise HeaderError(f"a length of {count} is not possible")
        return count

    def string(self) -> str:
        start = self.skip_string()
        return self._data[start : self.at].decode("utf-8", "replace")

    def skip_string(self) -> int:
        """Skip a string; return where its bytes start."""
        length = self.count()
        start, self.at = self.at, self.at + length
        return start

    def value(self, kind: int) -> Any:
        """Return a scalar or a string; skip a list, and return None."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            self._skip_list()
            return None
        raise HeaderError(f"values of type {kind} are not known")

    def _skip_list(self) -> None:
        kind, count = self.number("I"), self.count()
        if kind in SCALARS:
            self.at += count * struct.calcsize(f"<{SCALARS[kind]}")
            return
        if kind != STRING:
            raise HeaderError(f"lists of type {kind} are not known")
        # vocabularies have hundreds of thousands of entries
        data, at, length = self._data, self.at, struct.Struct("<Q").unpack_from
        for _ in range(count):
            at += 8 + length(data, at)[0]
        self.at = at


def read_general(path: Path) -> dict[str, Any]:
    """Return the scalars and strings of `path` whose keys start with `general.`. Errors are those of `read_scalars`."""
    return {key: value for key, value in read_scalars(path).items() if key.startswith("general.")}


def read_scalars(path: Path) -> dict[str, Any]:
    """Return all scalars and strings of the metadata of `path`.

    Raises:
        OSError: The file cannot be read.
        HeaderError: It is not a GGUF file of a known version, or it is damaged.
    """
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8 or start[:4] != b"GGUF" or struct.unpack("<I", start[4:])[0] not in VERSIONS:
            raise HeaderError("not a GGUF file of a known version")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _scalars(_Metadata(data))
            except (struct.error, IndexError, OverflowError) as error:
                raise HeaderError(f"the metadata are damaged ({error})") from error


def _scalars(metadata: _Metadata) -> dict[str, Any]:
    metadata.count()  # of tensors
    found = {}
    for _ in range(metadata.count()):
        key = metadata.string()
        value = metadata.value(metadata.number("I"))
        if value is not None:
            found[key] = value
    return found
