"""Where a model runs and in which number format: safe and fast choices, and whether it fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streamchat.errors import ConfigError, ModelNotFoundError
from streamchat.units import human_bytes

if TYPE_CHECKING:
    import torch

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
HEADROOM = 1.05
"""Buffers beside the weights; the KV cache is small and bounded."""


def available_devices() -> list[str]:
    """The devices of this machine that torch can use, best first."""
    import torch

    found = []
    if torch.cuda.is_available():
        found.append("cuda")
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, "cpu"]


def choose_device(asked: str) -> str:
    """`auto` takes the best device.

    Raises:
        ConfigError: The asked device is not here.
    """
    here = available_devices()
    if asked == "auto":
        return here[0]
    if asked not in here:
        raise ConfigError(f"device = {asked!r} is not available here; available: {', '.join(here)}")
    return asked


def choose_dtype(asked: str, device: str) -> tuple[str, tuple[str, ...]]:
    """The number format for `device`, and what the user should know about it."""
    if asked != "auto":
        return asked, _notes(asked, device)
    if device == "cuda":
        return ("bfloat16" if _cuda_bfloat16() else "float16"), ()
    if device == "mps":
        return ("bfloat16" if _mps_bfloat16() else "float16"), ()
    return ("bfloat16" if cpu_has_bfloat16() else "float32"), ()


def cpu_has_bfloat16() -> bool:
    """Whether this CPU computes in bfloat16 itself; elsewhere torch emulates it, slower than float32."""
    import torch

    cpu: Any = torch.cpu
    try:
        capabilities: dict[str, Any] = cpu.get_capabilities()
    except (AttributeError, RuntimeError):
        return False
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _cuda_bfloat16() -> bool:
    import torch

    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _mps_bfloat16() -> bool:
    import torch

    return bool(torch.backends.mps.is_macos_or_newer(14, 0))


def _notes(dtype: str, device: str) -> tuple[str, ...]:
    if device == "cpu" and dtype == "float16":
        return ("float16 is slow on a CPU; --dtype auto picks a faster number format",)
    if device == "cpu" and dtype == "bfloat16" and not cpu_has_bfloat16():
        return ("This CPU has no bfloat16 arithmetic and emulates it; --dtype float32 is faster",)
    if device == "cuda" and dtype == "bfloat16" and not _cuda_bfloat16():
        return ("This GPU has no bfloat16 arithmetic and emulates it; --dtype float16 is faster",)
    return ()


def check_memory(parameters: int, dtype: str, device: str, name: str) -> None:
    """Refuse, before the system kills the process, a model that cannot fit.

    Raises:
        ModelNotFoundError: The weights are bigger than the free memory.
    """
    need = int(parameters * BYTES[dtype] * HEADROOM)
    # Weights pass through main memory on their way to a device.
    places = ["cpu"] if device == "cpu" else ["cpu", device]
    for place in places:
        free = free_memory(place)
        if free is not None and need > free:
            where = "memory" if place == "cpu" else f"{place} memory"
            smaller = " or --dtype bfloat16" if dtype == "float32" else ""
            raise ModelNotFoundError(
                f"{name} needs {human_bytes(need)} of {where} in {dtype} and {human_bytes(free)} are free; choose a "
                f"smaller model{smaller}, or close other programs"
            )


def free_memory(device: str) -> int | None:
    """Bytes that can be allocated on `device`; None where that cannot be asked."""
    import psutil
    import torch

    if device == "cpu":
        return int(psutil.virtual_memory().available)
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    if device == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return None


def torch_dtype(name: str) -> torch.dtype:
    """`'float32'` -> `torch.float32`."""
    import torch

    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
