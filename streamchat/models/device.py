"""Where a model runs and in which number format: safe and fast choices, and whether it fits."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from streamchat.base.devices import device_type, devices_of, is_spread, join_devices
from streamchat.base.errors import ConfigError, ModelNotFoundError
from streamchat.base.formatting import human_bytes
from streamchat.base.processors import usable_processors
from streamchat.models.limits import available_memory

if TYPE_CHECKING:
    import torch

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
HEADROOM = 1.05
"""Buffers beside the weights; the KV cache is small and bounded."""
GET_ACCELERATE = "install it with: pip install accelerate"


def available_devices() -> list[str]:
    """The devices of this machine that torch can use, best first."""
    import torch

    found = []
    if torch.cuda.is_available():
        found.append("cuda")
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, "cpu"]


def limit_threads() -> None:
    """Have torch compute with no more threads than this process may use processors, unless the user said how many.

    torch counts the processors of the affinity, and knows of no control group.
    """
    import torch

    if os.environ.get("OMP_NUM_THREADS"):
        return
    if (usable := usable_processors()) < torch.get_num_threads():
        torch.set_num_threads(usable)


def gpus() -> list[str]:
    """The GPUs of CUDA (or ROCm) by name: `cuda:0`, `cuda:1`, ..."""
    import torch

    return [f"cuda:{number}" for number in range(torch.cuda.device_count())]


def choose_device(asked: str) -> str:
    """The place that `asked` names: `cuda:all` -> `cuda:0,1`. `auto` takes the best device, see also `roomy_place`.

    Raises:
        ConfigError: The asked device is not here, or what spreads a model over several is not installed.
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
    place = join_devices(wanted)
    if is_spread(place) and not can_spread():
        raise ConfigError(
            f"device = {asked!r} spreads the model over {place}, which needs accelerate; {GET_ACCELERATE}"
        )
    return place


def can_spread() -> bool:
    """Whether accelerate is installed, which puts layers on several GPUs."""
    return importlib.util.find_spec("accelerate") is not None


def roomy_place(parameters: int, dtype: str, name: str) -> str:
    """Where `auto` puts a model on CUDA: on the first GPU that has room, else on all of them together.

    Raises:
        ModelNotFoundError: Only all together have room, and accelerate is not installed.
    """
    need, found = _need(parameters, dtype), gpus()
    free = [free_memory(each) or 0 for each in found]
    first = next((number for number, size in enumerate(free) if size >= need), None)
    if first is not None or len(found) < 2:
        return f"cuda:{first}" if first else "cuda"
    if sum(free) >= need and not can_spread():
        raise ModelNotFoundError(
            f"{name} needs {human_bytes(need)} of GPU memory in {dtype}, which only {' and '.join(found)} together "
            f"have, and spreading it over them needs accelerate; {GET_ACCELERATE}, or choose a smaller model"
        )
    return join_devices(found)


def choose_dtype(asked: str, device: str) -> tuple[str, tuple[str, ...]]:
    """The number format for `device`, and what the user should know about it."""
    if asked != "auto":
        return asked, _notes(asked, device)
    if device_type(device) == "cuda":
        return ("bfloat16" if _cuda_bfloat16(devices_of(device)) else "float16"), ()
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


def _cuda_bfloat16(names: Sequence[str]) -> bool:
    """Whether all these GPUs compute in bfloat16 themselves."""
    import torch

    def has_it(name: str) -> bool:
        with torch.cuda.device(name):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))

    return all(has_it(name) for name in names)


def _mps_bfloat16() -> bool:
    import torch

    return bool(torch.backends.mps.is_macos_or_newer(14, 0))


def _notes(dtype: str, device: str) -> tuple[str, ...]:
    if device == "cpu" and dtype == "float16":
        return ("float16 is slow on a CPU; --dtype auto picks a faster number format",)
    if device == "cpu" and dtype == "bfloat16" and not cpu_has_bfloat16():
        return ("This CPU has no bfloat16 arithmetic and emulates it; --dtype float32 is faster",)
    if device_type(device) == "cuda" and dtype == "bfloat16" and not _cuda_bfloat16(devices_of(device)):
        return ("This GPU has no bfloat16 arithmetic and emulates it; --dtype float16 is faster",)
    return ()


def check_memory(parameters: int, dtype: str, device: str, name: str) -> None:
    """Refuse, before the system kills the process, a model that cannot fit.

    Raises:
        ModelNotFoundError: The weights are bigger than the free memory.
    """
    need = _need(parameters, dtype)
    # Weights pass through main memory on their way to a device, and one by one on their way to several.
    places = [device] if device == "cpu" or is_spread(device) else ["cpu", device]
    for place in places:
        free = free_memory(place)
        if free is not None and need > free:
            where = "memory" if place == "cpu" else f"{place} memory"
            smaller = " or --dtype bfloat16" if dtype == "float32" else ""
            raise ModelNotFoundError(
                f"{name} needs {human_bytes(need)} of {where} in {dtype} and {human_bytes(free)} are free; choose a "
                f"smaller model{smaller}, or close other programs"
            )


def _need(parameters: int, dtype: str) -> int:
    return int(parameters * BYTES[dtype] * HEADROOM)


def free_memory(device: str) -> int | None:
    """Bytes that can be allocated on `device`, on all of several together; None where that cannot be asked.

    What torch holds and does not use (a model that was switched off) counts as free.
    """
    import torch

    kind = device_type(device)
    if kind == "cpu":
        return available_memory()
    if kind == "cuda":
        return sum(_free_of_gpu(name) for name in devices_of(device))
    if kind == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return None


def _free_of_gpu(name: str) -> int:
    import torch

    unused = torch.cuda.memory_reserved(name) - torch.cuda.memory_allocated(name)
    return int(torch.cuda.mem_get_info(name)[0]) + unused


def give_back_unused() -> None:
    """Free what nobody refers to, and let other GPUs' and programs' allocations have it."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def torch_dtype(name: str) -> torch.dtype:
    """`'float32'` -> `torch.float32`."""
    import torch

    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
