"""The header of a GGUF file, read without the tensors."""

from __future__ import annotations

from pathlib import Path

from streamchat.models.gguf.header import HeaderError, read_scalars
from tools.fuzz.inputs import gguf_file
from tools.fuzz.target import Target


def run(data: bytes) -> None:
    """Read all scalars and strings."""
    path = Path("model.gguf")
    path.write_bytes(data)
    for name, value in read_scalars(path).items():
        assert isinstance(name, str)
        assert isinstance(value, str | int | float | bool)


def seeds() -> dict[str, bytes]:
    """A file with values of several types, and a truncated one."""
    whole = gguf_file("smollm")
    return {"whole": whole, "cut": whole[:90], "magic": b"GGUF\3\0\0\0"}


TARGET = Target(
    "gguf_header",
    run,
    seeds,
    ("streamchat.models.gguf.header",),
    (HeaderError, OSError, ValueError),
    (b"general.name", b"\x08\0\0\0", b"\x09\0\0\0", b"\xff" * 8, b"\0\0\0\1\0\0\0\0"),
    suite_runs=300,
)
