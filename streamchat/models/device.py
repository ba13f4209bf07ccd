"""Choice of device and dtype for a model, and whether the model fits into memory."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch

from streamchat.base.devices import device_type, devices_of, is_spread, join_devices
from streamchat.base.errors import ConfigError, ModelNotFoundError
from streamchat.base.formatting import human_bytes
from streamchat.base.processors import usable_processors
from streamchat.models.limits import available_memory

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
HEADROOM = 1.05
"""Memory for weights and buffers, relative to the weights; the KV cache is small and bounded."""
INSTALL_ACCELERATE = "install it with: pip install accelerate"


def available_devices() -> list[str]:
    """Return the devices of this machine that torch can use, best first."""
    found = []
    if torch.cuda.is_available():
        found.append("cuda")
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, "cpu"]


def limit_threads() -> None:
    """Limit torch's threads to the processors that this process may use, unless `OMP_NUM_THREADS` is set.

    torch considers the CPU affinity, but not the limits of a control group.
    """
    if os.environ.get("OMP_NUM_THREADS"):
        return
    if (usable := usable_processors()) < torch.get_num_threads():
        torch.set_num_threads(usable)


def gpus() -> list[str]:
    """Return the names of the CUDA (or ROCm) GPUs: `cuda:0`, `cuda:1`, ..."""
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())]


def choose_device(asked: str) -> str:
    """Return the device that `asked` names: `cuda:all` -> `cuda:0,1`. `auto` is the best one; see `device_with_room`.

    Raises:
        ConfigError: The device is not available, or accelerate is needed for several GPUs and not installed.
    """
    here = available_devices()
    if asked == "auto":
        return here[0]
    kind, _, numbers = asked.partition(":")
    if kind not in here or not numbers:
        if asked not in here:
            raise ConfigError(f"device = {asked!r} is not available here; available: {', '.join(here)}")
        return asked
    found = gpus()
    wanted = found if numbers == "all" else [f"{kind}:{int(number)}" for number in numbers.split(",")]
    if missing := [name for name in wanted if name not in found]:
        names = ", ".join([*found, *here[1:]])
        raise ConfigError(f"device = {asked!r} cannot be used: there is no {missing[0]} here; available: {names}")
    device = join_devices(wanted)
    if is_spread(device) and not can_spread():
        raise ConfigError(
            f"device = {asked!r} spreads the model over {device}, which needs accelerate; {INSTALL_ACCELERATE}"
        )
    return device


def can_spread() -> bool:
    """Return whether accelerate is installed, which spreads layers over several GPUs."""
    return importlib.util.find_spec("accelerate") is not None


def device_with_room(parameters: int, dtype: str, name: str) -> str:
    """Return the device that `auto` uses with CUDA: the first GPU that has room, else all GPUs.

    Raises:
        ModelNotFoundError: The model fits only on all GPUs together, and accelerate is not installed.
    """
    need, found = _need(parameters, dtype), gpus()
    free = [free_memory(each) or 0 for each in found]
    first = next((number for number, size in enumerate(free) if size >= need), None)
    if first is not None or len(found) < 2:
        return f"cuda:{first}" if first else "cuda"
    if sum(free) >= need and not can_spread():
        raise ModelNotFoundError(
            f"{name} needs {human_bytes(need)} of GPU memory in {dtype}, which only {' and '.join(found)} together "
            f"have, and spreading it over them needs accelerate; {INSTALL_ACCELERATE}, or choose a smaller model"
        )
    return join_devices(found)


def choose_dtype(asked: str, device: str) -> tuple[str, tuple[str, ...]]:
    """Return the dtype for `device`, and notes for the user."""
    if asked != "auto":
        return asked, _notes(asked, device)
    if device_type(device) == "cuda":
        return ("bfloat16" if _cuda_bfloat16(devices_of(device)) else "float16"), ()
    if device == "mps":
        return ("bfloat16" if torch.backends.mps.is_macos_or_newer(14, 0) else "float16"), ()
    return ("bfloat16" if cpu_has_bfloat16() else "float32"), ()


def choose_cache_dtype(asked: str, dtype: str, device: str, compiled: bool) -> str:
    """Return the dtype for cached keys and values: the model's, with one exception.

    If `auto` chose float32 because the processor lacks bfloat16 arithmetic, it is bfloat16, which the compiled kernels
    can read and write without such arithmetic.

    Args:
        asked: The `dtype` setting.
        dtype: The dtype of the model.
        device: The device of the model.
        compiled: Whether compiled kernels decode.
    """
    return "bfloat16" if compiled and (asked, dtype, device) == ("auto", "float32", "cpu") else dtype


def cpu_has_bfloat16() -> bool:
    """Return whether torch uses bfloat16 instructions of this CPU; emulating bfloat16 is slower than float32.

    `ATEN_CPU_CAPABILITY=avx2` limits torch to instructions without them.
    """
    cpu: Any = torch.cpu
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "DEFAULT", "NO AVX"):
        return False
    try:
        capabilities: dict[str, Any] = cpu.get_capabilities()
    except (AttributeError, RuntimeError):
        return False
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _cuda_bfloat16(names: Sequence[str]) -> bool:
    """Return whether all these GPUs have native bfloat16."""

    def has_it(name: str) -> bool:
        with torch.cuda.device(name):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))

    return all(has_it(name) for name in names)


def _notes(dtype: str, device: str) -> tuple[str, ...]:
    if device == "cpu" and dtype == "float16":
        return ("float16 is slow on a CPU; --dtype auto picks a faster dtype",)
    if device == "cpu" and dtype == "bfloat16" and not cpu_has_bfloat16():
        return ("This CPU has no bfloat16 arithmetic and emulates it; --dtype float32 is faster",)
    if device_type(device) == "cuda" and dtype == "bfloat16" and not _cuda_bfloat16(devices_of(device)):
        return ("This GPU has no bfloat16 arithmetic and emulates it; --dtype float16 is faster",)
    return ()


def check_memory(parameters: int, dtype: str, device: str, name: str) -> None:
    """Refuse a model that cannot fit, before the operating system kills the process.

    Raises:
        ModelNotFoundError: The weights are larger than the free memory.
    """
    need = _need(parameters, dtype)
    # All weights pass through main memory on the way to one device, but one at a time on the way to several.
    checked = [device] if device == "cpu" or is_spread(device) else ["cpu", device]
    for each in checked:
        free = free_memory(each)
        if free is not None and need > free:
            where = "memory" if each == "cpu" else f"{each} memory"
            smaller = " or --dtype bfloat16" if dtype == "float32" else ""
            raise ModelNotFoundError(
                f"{name} needs {human_bytes(need)} of {where} in {dtype} and {human_bytes(free)} are free; choose a "
                f"smaller model{smaller}, or close other programs"
            )


def check_served_memory(file_bytes: int, name: str) -> None:
    """Refuse a model whose weights are mapped from a file that is larger than the free memory.

    Raises:
        ModelNotFoundError: There is too little memory.
    """
    need, free = int(file_bytes * HEADROOM), available_memory()
    if need > free:
        raise ModelNotFoundError(
            f"{name} needs {human_bytes(need)} of memory and {human_bytes(free)} are free; choose a smaller model, or "
            "close other programs"
        )


def _need(parameters: int, dtype: str) -> int:
    return int(parameters * BYTES[dtype] * HEADROOM)


def free_memory(device: str) -> int | None:
    """Return the bytes that can be allocated on `device` (the sum for several GPUs), or None if unknown.

    Memory that torch has reserved but does not use (from a model that was unloaded) counts as free.
    """
    kind = device_type(device)
    if kind == "cpu":
        return available_memory()
    if kind == "cuda":
        return sum(_free_of_gpu(name) for name in devices_of(device))
    if kind == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return None


def _free_of_gpu(name: str) -> int:
    unused = torch.cuda.memory_reserved(name) - torch.cuda.memory_allocated(name)
    return int(torch.cuda.mem_get_info(name)[0]) + unused


def free_unused_memory() -> None:
    """Collect garbage and release unused cached CUDA memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
