"""The model of a measurement, and how its page names the model, the machine and the arguments."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamchat.base.devices import device_type, devices_of
from streamchat.base.formatting import plural
from streamchat.base.progress import Progress
from streamchat.config.loader import Configuration
from streamchat.reports.machine import machine_line, processor, versions

if TYPE_CHECKING:
    from streamchat.models.load import LoadedModel

SETTINGS = (
    *("model", "adapter", "device", "dtype", "attention", "weights", "kernels"),
    *("cache_size", "num_sink_tokens", "evict", "kv_dtype"),
)
"""Settings that `streamchat bench` takes from the command line."""


def load_in_thread(configuration: Configuration, progress: Progress) -> LoadedModel:
    """Load the model in a thread that ends, like an engine's.

    PyTorch has OpenMP threads for each thread that calls it. If two such groups together have more threads than there
    are cores, they sleep whenever they wait for each other, which makes every operation of PyTorch slower.
    """
    from streamchat.models.load import load_from_settings

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(load_from_settings, configuration.settings, progress).result()


def cache_size(configuration: Configuration, loaded: LoadedModel) -> tuple[int, str | None]:
    """Return the budget in tokens, and a note for the user if there is one."""
    from streamchat.cache.context import context_length
    from streamchat.conversation.budget import resolve_cache_size

    return resolve_cache_size(configuration, context_length(loaded.model.config))


def gguf_file(configuration: Configuration, loaded: LoadedModel) -> Path | None:
    """Return the absolute path of the GGUF file that the model was loaded from; None if there is none."""
    from streamchat.models.bundled.default import default_gguf
    from streamchat.models.hub_cache import cached_gguf
    from streamchat.models.hub_gguf import parse_gguf_name

    name = parse_gguf_name(loaded.source)
    cached = None if name is None else cached_gguf(name)
    source = Path(loaded.source) if cached is None else cached.path
    if source.suffix == ".gguf" and source.exists():
        return source.absolute()
    return default_gguf() if configuration.settings.model == "default" and default_gguf().exists() else None


def about(command: str, loaded: LoadedModel, **arguments: Any) -> dict[str, Any]:
    """Return what was measured on what, for JSON."""
    import torch

    return {
        "command": command,
        "model": loaded.name,
        "source": loaded.source,
        "device": loaded.device,
        "dtype": loaded.dtype,
        "cache_dtype": loaded.cache_dtype or loaded.dtype,
        "weights": loaded.weights,
        "attention": str(loaded.model.config._attn_implementation),
        "threads": torch.get_num_threads() if loaded.device == "cpu" else 0,
        "instructions": torch.backends.cpu.get_cpu_capability() if loaded.device == "cpu" else "",
        **arguments,
        **machine(),
    }


def machine() -> dict[str, Any]:
    """Return the machine and its software, for JSON."""
    return {"versions": versions(), "processor": processor()}


def heading(loaded: LoadedModel, *more: str) -> list[str]:
    """Return the first lines of a page: the model and `more` about the run, and the machine."""
    import torch

    weights = [] if loaded.weights == "native" else [f"{loaded.weights} weights"]
    cache = [] if loaded.cache_dtype in ("", loaded.dtype) else [f"{loaded.cache_dtype} cache"]
    uses: list[str] = []
    if loaded.device == "cpu":
        uses = [plural(torch.get_num_threads(), "thread"), torch.backends.cpu.get_cpu_capability()]
    first = [loaded.name, f"{loaded.dtype} on {device_name(loaded.device)}", *weights, *cache, *uses, *more]
    return [", ".join(first), machine_line()]


def device_name(device: str) -> str:
    """Return the name of a GPU as its driver gives it, or `device` itself."""
    import torch

    return torch.cuda.get_device_name(devices_of(device)[0]) if device_type(device) == "cuda" else device
