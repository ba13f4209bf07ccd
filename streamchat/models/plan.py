"""Plans how a model is loaded: from which folder, on which device, in which dtype. Loads no weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from streamchat.base.devices import is_spread
from streamchat.base.errors import ConfigError
from streamchat.base.progress import Progress
from streamchat.kernels.library import Kernels, load_kernels
from streamchat.models import device as devices
from streamchat.models.adapters import Adapter, name_with, require_peft
from streamchat.models.fetch import fetch_source
from streamchat.models.folder import Contents, inspect
from streamchat.models.hub_cache import older_note
from streamchat.models.resolve import Source, shadowing_note
from streamchat.models.staging import read_manifest

KERNELS_STAGE = "Preparing kernels (compiled once)"
"""Stage of the progress while the kernels are loaded; the first start compiles them, which takes seconds."""


@dataclass(frozen=True)
class LoadPlan:
    """What to load, on which device and in which dtype."""

    source: Source
    folder: Path
    """In the format of transformers."""
    contents: Contents
    device: str
    dtype: str
    attention: str
    dtype_notes: tuple[str, ...] = ()
    """Notes for the user about the dtype."""
    notes: tuple[str, ...] = ()
    """Notes about source and device."""
    kernels: Kernels | None = None
    """The compiled kernels that serve tiles; None for native weights."""
    tiles: Path | None = None
    """The folder with the tiles of the weights, and their config; None if there are no tiles."""
    adapters: tuple[Adapter, ...] = ()
    """LoRA adapters of the model."""
    merged: bool = False
    """Whether the tiles already contain the adapters."""

    @property
    def name(self) -> str:
        """Display name of the model with its adapters."""
        return name_with(self.source.name, self.adapters)

    @property
    def to_merge(self) -> tuple[Adapter, ...]:
        """The adapters that must be merged into the weights after they are read."""
        return () if self.merged else self.adapters

    def check_memory(self) -> None:
        """Require enough free memory on the device.

        Raises:
            ModelNotFoundError: There is too little.
        """
        if self.kernels is not None:
            devices.check_served_memory(self.contents.file_bytes, self.name)
        else:
            devices.check_memory(self.contents.parameters, self.dtype, self.device, self.name)

    def in_safe_dtype(self) -> LoadPlan:
        """Return the plan for a model that overflows in float16."""
        dtype = "bfloat16" if self.device != "cpu" or devices.cpu_has_bfloat16() else "float32"
        return replace(self, dtype=dtype, dtype_notes=(f"{self.name} overflows in float16, so it runs in {dtype}",))


def make_plan(
    source: Source,
    asked: str,
    *,
    device: str,
    dtype: str,
    attention: str,
    progress: Progress,
    weights: str = "native",
    kernels: str = "auto",
    adapters: tuple[Adapter, ...] = (),
) -> LoadPlan:
    """Return the plan for `source`, which the user called `asked`; fetch or convert it first if needed.

    See `load_model`.
    """
    if adapters:
        require_peft()
    # check the device before fetching anything
    devices.limit_threads()
    chosen_device = devices.choose_device(device)
    chosen_dtype, dtype_notes = devices.choose_dtype(dtype, chosen_device)
    source = fetch_source(source, asked, progress)
    folder = _local_folder(source, progress)
    notes = [*filter(None, [shadowing_note(asked, source)]), *_source_notes(source, folder)]
    contents = inspect(folder)
    if device == "auto" and chosen_device == "cuda":
        chosen_device = devices.device_with_room(contents.parameters, chosen_dtype, source.name)
        if is_spread(chosen_device):
            notes.append(f"{source.name} fits on no single GPU, so it is spread over {chosen_device}")
    if adapters and is_spread(chosen_device):
        raise ConfigError(f"--adapter cannot be used with a model spread over {chosen_device}; choose one device")
    serving = None
    # adapters are merged into native weights, so tiles are dequantized for them
    if chosen_device == "cpu" and not adapters and serves_tiles(contents, weights, dtype):
        progress(KERNELS_STAGE, 0, 0, "")
        serving = load_kernels(kernels)
    plan = LoadPlan(
        source,
        folder,
        contents,
        chosen_device,
        chosen_dtype,
        attention,
        dtype_notes,
        tuple(notes),
        serving,
        adapters=adapters,
    )
    if contents.kinds is not None:
        plan = replace(plan, tiles=folder)
    plan.check_memory()
    return plan


def serves_tiles(contents: Contents, weights: str, dtype: str) -> bool:
    """Return whether a chat on compiled kernels uses the tiles of the folder as they are.

    Args:
        contents: Of the folder; without tiles, the result is False.
        weights: The setting. `auto` uses them, except in float32; `int8` and `int4` only if all tiles are of that kind.
        dtype: The setting.
    """
    if contents.kinds is None:
        return False
    return (weights == "auto" and dtype != "float32") or {weights} == contents.kinds


def _local_folder(source: Source, progress: Progress) -> Path:
    """Return the local folder in transformers' format; convert a GGUF file if needed."""
    if source.kind == "gguf":
        from streamchat.models.gguf.convert import converted_copy

        return converted_copy(Path(source.location), progress=progress)
    return Path(source.location)


def _source_notes(source: Source, folder: Path) -> tuple[str, ...]:
    """Return notes for the user about the source of the model."""
    if source.kind == "gguf":
        return tuple((read_manifest(folder) or {}).get("notes", ()))
    if source.kind == "hub-cache" and (note := older_note(source.repo_id, folder)):
        return (note,)
    return ()
