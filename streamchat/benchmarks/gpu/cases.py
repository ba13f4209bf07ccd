"""What `bench --gpu` measures: cases, their order, and the result of each. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamchat.base.errors import ConfigError

MODEL = "model"
"""The shape that stands for the model of `--model`."""
SHAPES = (MODEL, "135M", "410M", "1.7B", "8B")
"""Models to measure, the smallest first; all but the first have random weights."""
OURS = ("fused", "graph", "plain")
"""Kinds that are values of the setting `decode`."""
KINDS = ("fused", "graph", "generate", "plain", "static")
"""Kinds in the order in which they are measured. `generate` has a growing cache, `static` a compiled static one."""
KV_DTYPES = {MODEL: ("int8", "int4"), "8B": ("int8", "int4")}
"""Shapes whose fused step is measured with quantized keys and values, too, and their dtypes."""
INT4 = {"8B": ("fused", "graph")}
"""Shapes that are measured with int4 weights, too, and the kinds."""


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    shape: str
    weights: str
    """native or int4."""
    kind: str
    kv_dtype: str = "native"
    """Of the cached keys and values: native, int8 or int4."""

    @property
    def name(self) -> str:
        """For progress messages: `8B int4, fused`, `8B, fused, keys in int8`."""
        weights = "" if self.weights == "native" else f" {self.weights}"
        keys = "" if self.kv_dtype == "native" else f", keys in {self.kv_dtype}"
        return f"{self.shape}{weights}, {self.kind}{keys}"


@dataclass(frozen=True)
class Row:
    """The figures of a case, with a full cache of the budget; None for what was not measured."""

    case: Case
    model: str = ""
    """Display name."""
    tps: float | None = None
    """Tokens per second, of the median time per token."""
    mean_tps: float | None = None
    """Tokens per second with the evictions between the tokens."""
    timed: int = 0
    """Tokens that were timed."""
    token_bytes: int | None = None
    """Bytes of weights, keys and values that one token reads."""
    share: float | None = None
    """Share of the measured bandwidth: `tps * token_bytes / bandwidth`."""
    kernels: int | None = None
    """Kernels that the device runs per token."""
    busy_ms: float | None = None
    """Milliseconds per token in which the device runs them, one after the other."""
    first_token_ms: float | None = None
    """Median time to the first token of a short prompt on a full cache."""
    prefill_tps: float | None = None
    """Tokens per second of a prompt that fills the cache."""
    allocated: int | None = None
    """Device memory in live tensors at the end."""
    seconds: float = 0.0
    """Duration of the measurement."""
    error: str = ""
    """Why there are no figures, in one line."""


@dataclass(frozen=True)
class Tenth:
    """A tenth of the long reply."""

    tokens: int
    """Tokens decoded up to its end."""
    tps: float
    """Tokens per second over all of it."""
    allocated: int | None


def parse_names(given: str, known: Sequence[str], flag: str) -> tuple[str, ...]:
    """Return the names of a list `A,B,...` in the order of `known`.

    Raises:
        ConfigError: The list is empty, or one of them is not known.
    """
    names = [name.strip() for name in given.split(",") if name.strip()]
    wrong = next((name for name in names if name not in known), None)
    if wrong is not None:
        raise ConfigError(f"{flag}: {wrong!r} is not known; choose from {', '.join(known)}")
    if not names:
        raise ConfigError(f"{flag} is empty; choose from {', '.join(known)}")
    return tuple(name for name in known if name in names)


def cases_of(shapes: Sequence[str], kinds: Sequence[str], kv_dtype: str = "auto") -> list[Case]:
    """Return the cases, the most valuable first: those that compile, which takes a minute each, come last.

    Args:
        shapes: Some of `SHAPES`.
        kinds: Some of `KINDS`.
        kv_dtype: How the steps of `OURS` cache keys and values; `auto`: native, and the rows of `KV_DTYPES`.
    """
    found = []
    given = kv_dtype if kv_dtype != "auto" else "native"
    for shape in shapes:
        found += [
            Case(shape, "native", kind, given if kind in OURS else "native") for kind in kinds if kind != "static"
        ]
        found += [Case(shape, "int4", kind, given) for kind in INT4.get(shape, ()) if kind in kinds]
        if kv_dtype == "auto" and "fused" in kinds:
            found += [Case(shape, "native", "fused", each) for each in KV_DTYPES.get(shape, ())]
    return found + [Case(shape, "native", "static") for shape in shapes if "static" in kinds]
