"""Loading a model by name: resolve, fetch or convert if needed, load, check."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamchat.base.devices import is_spread
from streamchat.base.errors import ModelNotFoundError, UnsupportedModelError, short
from streamchat.base.progress import Progress as Progress
from streamchat.base.progress import silent
from streamchat.models import device as devices
from streamchat.models.contents import folder_digest
from streamchat.models.folder import Contents, inspect, weight_files
from streamchat.models.hub_cache import older_note
from streamchat.models.limits import check_start
from streamchat.models.quiet import quiet
from streamchat.models.resolve import Source, resolve, shadowing_note
from streamchat.models.staging import read_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode, without gradients, on its device or devices, with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    """Display name: 'SmolLM2-135M-Instruct', 'pythia-410m', the name of a folder."""
    source: str
    """Folder, file or Hub id that it was loaded from."""
    device: str
    """`cpu`, `mps`, `cuda`, `cuda:1`, or `cuda:0,1` if its layers are spread over several GPUs."""
    dtype: str
    notes: tuple[str, ...] = ()
    """Notes to show to the user once."""
    weights: str = "native"
    """"native", or the precision of the quantized weights for decoding: "int8" or "int4"."""
    quantized_bytes: int = 0
    """Memory of the quantized copies, in addition to the native weights."""


def load_model(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "sdpa",
    weights: str = "native",
    kernels: str = "auto",
    progress: Progress | None = None,
) -> LoadedModel:
    """Load the model that `name` means; fetch or convert it first if needed. Prints nothing.

    Args:
        name: `default`, an alias, a Hub id, a folder or a .gguf file.
        device: `auto`, `cpu`, `mps`, `cuda`, `cuda:1`, `cuda:0,1` or `cuda:all`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        attention: `sdpa` or `eager`; a model without sdpa gets eager, with a note.
        weights: `auto`, `native`, `int8` or `int4`, see `use_weights`.
        kernels: `auto`: native kernels for decoding on a CPU if there is a compiler; `torch`: PyTorch's kernels.
        progress: Called with the stage; may raise to cancel.

    Raises:
        ModelNotFoundError: The model was not found, cannot be fetched, is damaged, or does not fit on this machine.
        UnsupportedModelError: The model was found, but is not a causal language model that can be loaded safely.
        ConfigError: The device is not available, accelerate is needed and not installed, or the weights are not
            possible here.
    """
    progress = progress or silent
    check_start()
    source = resolve(name)
    shadowing = shadowing_note(name, source)
    # check the device before fetching anything
    progress("Starting torch", 0, 0, "")
    devices.limit_threads()
    chosen_device = devices.choose_device(device)
    chosen_dtype, notes = devices.choose_dtype(dtype, chosen_device)
    folder = _local_folder(source, name, progress)
    notes = (*notes, *_source_notes(source, folder))
    contents = inspect(folder)
    if device == "auto" and chosen_device == "cuda":
        chosen_device = devices.device_with_room(contents.parameters, chosen_dtype, source.name)
        if is_spread(chosen_device):
            notes = (*notes, f"{source.name} fits on no single GPU, so it is spread over {chosen_device}")
    devices.check_memory(contents.parameters, chosen_dtype, chosen_device, source.name)
    contents_digest = _digest_of(folder, source, progress)
    progress(f"Loading {source.name}", 0, 0, "")
    from streamchat.kernels.library import allow
    from streamchat.kernels.library import kernels as compiled_kernels

    with quiet():
        from streamchat.decode.install import install
        from streamchat.models.fingerprint import set_contents_digest
        from streamchat.models.quantize.cpu import use_weights
        from streamchat.quantization.linear import quantized_bytes

        _check_config(folder, contents, source)
        tokenizer = _load_tokenizer(folder, source)
        load = partial(_load_on_device, folder, source, contents.parameters, attention=attention)
        model, chosen_device, load_notes = load(chosen_device, chosen_dtype)
        if chosen_dtype == "float16" and not _is_finite(model):
            safe = "bfloat16" if chosen_device != "cpu" or devices.cpu_has_bfloat16() else "float32"
            notes = (
                *_source_notes(source, folder),
                f"{source.name} overflows in float16, so it runs in {safe}",
            )
            del model
            devices.free_unused_memory()
            chosen_dtype = safe
            devices.check_memory(contents.parameters, chosen_dtype, chosen_device, source.name)
            model, chosen_device, load_notes = load(chosen_device, chosen_dtype)
    progress(f"Loading {source.name}", 0, 0, "")
    allow(kernels)
    if chosen_device == "cpu":
        progress("Preparing kernels", 0, 0, "")
        compiled_kernels()
    if weights == "auto" and dtype == "float32":
        weights = "native"  # float32 was requested: do not quantize
    set_contents_digest(model, contents_digest)
    used, weight_notes = use_weights(
        model, tokenizer, weights, device=chosen_device, name=source.name, progress=progress
    )
    install(model)
    progress(f"Loading {source.name}", 0, 0, "")
    return LoadedModel(
        model,
        tokenizer,
        source.name,
        source.repo_id or source.location,
        chosen_device,
        chosen_dtype,
        (*filter(None, [shadowing]), *notes, *load_notes, *weight_notes),
        used,
        quantized_bytes(model),
    )


def _local_folder(source: Source, asked: str, progress: Progress) -> Path:
    """Return the local folder in transformers' format; fetch or convert the model if needed."""
    if source.kind == "bundled":
        from streamchat.models.bundled.default import ensure_default_model

        return ensure_default_model(progress)
    if source.kind == "gguf":
        from streamchat.models.gguf.convert import converted_copy

        return converted_copy(Path(source.location), progress=progress)
    if source.kind == "hub":
        from streamchat.models.hub import fetch_from_hub

        return fetch_from_hub(source.location, asked, progress=progress)
    return Path(source.location)


def _source_notes(source: Source, folder: Path) -> tuple[str, ...]:
    """Return notes for the user about the source of the model."""
    if source.kind == "gguf":
        return tuple((read_manifest(folder) or {}).get("notes", ()))
    if source.kind == "hub-cache" and (note := older_note(source.repo_id, folder)):
        return (note,)
    return ()


def _digest_of(folder: Path, source: Source, progress: Progress) -> str:
    """Return the digest of all files that weights are loaded from."""
    files = {*weight_files(folder), *folder.glob("adapter_*")}  # transformers also loads an adapter next to the weights
    return folder_digest(folder, files, name=source.name, progress=progress)


def _check_config(folder: Path, contents: Contents, source: Source) -> None:
    """Refuse what transformers cannot load as a causal language model, with the reason."""
    import transformers
    from transformers.models.auto import modeling_auto

    kind = str(contents.config.get("model_type") or "")
    library: Any = modeling_auto
    configs: Any = transformers.CONFIG_MAPPING
    if kind not in configs:
        if contents.config.get("auto_map"):
            raise UnsupportedModelError(
                f"{source.name} ({kind or 'no model_type'}) requires trust_remote_code, which streamchat does not "
                "allow; choose a model that transformers supports itself"
            )
        raise UnsupportedModelError(
            f"{source.name} is of type {kind!r}, which transformers {transformers.__version__} does not support; "
            "choose another model"
        )
    if kind not in library.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedModelError(
            f"{source.name} is of type {kind!r}, which is not a causal language model; choose one that is"
        )


def _load_tokenizer(folder: Path, source: Source) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    library: Any = AutoTokenizer
    try:
        tokenizer: PreTrainedTokenizerBase = library.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise ModelNotFoundError(
            f"The tokenizer of {source.name} in {folder} cannot be read ({short(error)}); fetch the model again"
        ) from error
    return tokenizer


def _load_on_device(
    folder: Path, source: Source, parameters: int, device: str, dtype: str, *, attention: str
) -> tuple[PreTrainedModel, str, tuple[str, ...]]:
    """Return the model, its device, and notes. A model that fails on several GPUs is loaded on a single one."""
    model, notes = _load_weights(folder, source, device, dtype, attention)
    if not is_spread(device):
        return model, device, notes
    from streamchat.models.spread import forward_error, gpu_with_most_memory, used_devices

    used = used_devices(model, device, source.name)
    fault = forward_error(model)
    if not fault:
        return model, used, notes
    del model
    devices.free_unused_memory()
    single = gpu_with_most_memory(device)
    why = f"{source.name} cannot be spread over {device} ({fault})"
    try:
        devices.check_memory(parameters, dtype, single, source.name)
    except ModelNotFoundError as error:
        raise UnsupportedModelError(f"{why}, and it does not fit on one of them: {error}") from error
    model, notes = _load_weights(folder, source, single, dtype, attention)
    return model, single, (*notes, f"{why}, so it runs on {single}")


def _load_weights(
    folder: Path, source: Source, device: str, dtype: str, attention: str
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    import torch
    from transformers import AutoModelForCausalLM

    library: Any = AutoModelForCausalLM
    notes: tuple[str, ...] = ()
    spread: dict[str, Any] = {}
    if is_spread(device):
        from streamchat.models.spread import spread_arguments

        spread = spread_arguments(device)

    def read(how: str) -> tuple[Any, dict[str, Any]]:
        result: tuple[Any, dict[str, Any]] = library.from_pretrained(
            str(folder),
            dtype=devices.torch_dtype(dtype),
            attn_implementation=how,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **spread,
        )
        return result

    try:
        try:
            model, info = read(attention)
        except (ValueError, ImportError) as error:
            if attention == "eager" or "scaled_dot_product_attention" not in str(error):
                raise
            model, info = read("eager")
            notes = (f"{source.name} has no {attention} attention, so it runs with eager attention",)
        _check_complete(info, source)
        if not spread:
            model = model.to(device)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ModelNotFoundError(
            f"{source.name} does not fit into the memory of {device} in {dtype}; choose a smaller model"
        ) from error
    except UnsupportedModelError:
        raise
    except Exception as error:
        if "Cannot allocate memory" in str(error):  # safetensors has no specific error for it
            raise ModelNotFoundError(
                f"{source.name} does not fit into the memory of {device} in {dtype}; choose a smaller model"
            ) from error
        raise UnsupportedModelError(
            f"{source.name} in {folder} cannot be loaded as a causal language model ({short(error)}); choose "
            "another model"
        ) from error
    model.eval()
    model.requires_grad_(False)
    return model, notes


def _check_complete(info: dict[str, Any], source: Source) -> None:
    """Refuse a model with missing weights, which transformers would silently fill with random numbers."""
    for kind, words in (("missing_keys", "lacks"), ("mismatched_keys", "has the wrong shape for")):
        if keys := sorted(str(key) for key in info.get(kind) or ()):
            raise UnsupportedModelError(
                f"{source.name} {words} {len(keys)} of the weights of a causal language model ({keys[0]} is the "
                "first), so its output would be nonsense; choose a complete model"
            )


def _is_finite(model: Any) -> bool:
    """Return whether the logits of a few tokens are finite; float16 overflows above 65,504."""
    import torch

    ids = (
        torch.arange(8, device=model.get_input_embeddings().weight.device).unsqueeze(0)
        % model.config.get_text_config().vocab_size
    )
    with torch.inference_mode():
        return bool(torch.isfinite(model(ids, use_cache=False).logits).all())
