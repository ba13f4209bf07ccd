"""From a name to a model that answers: resolve, fetch or convert where needed, load, check."""

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
    """A model that is ready: in eval mode, on its device or devices, in its number format, without gradients."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    """For people: 'SmolLM2-135M-Instruct', 'pythia-410m', the name of a folder."""
    source: str
    """Folder, file or Hub id that it came from."""
    device: str
    """`cpu`, `mps`, `cuda`, `cuda:1`, or `cuda:0,1` where its layers are spread over several GPUs."""
    dtype: str
    notes: tuple[str, ...] = ()
    """Sentences that the user should see once."""
    weights: str = "native"
    """"native", or what a few tokens at once are multiplied by: "int8" or "int4"."""
    packed_bytes: int = 0
    """Memory of the packed weights, beside the native ones."""


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
    """Load the model that `name` means; fetched or converted first where needed. Prints nothing.

    Args:
        name: `default`, an alias, a Hub id, a folder or a .gguf file.
        device: As the setting: `auto`, `cpu`, `mps`, `cuda`, `cuda:1`, `cuda:0,1`, `cuda:all`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        attention: `sdpa` or `eager`; a model without sdpa gets eager, with a note.
        weights: `auto`, `native`, `int8` or `int4`, see `use_weights`.
        kernels: `auto`: compiled kernels for a few tokens on a CPU, where there is a compiler; `torch`: PyTorch's.
        progress: Told what is going on; may raise to cancel.

    Raises:
        ModelNotFoundError: Not there, not to be had, damaged, or too big for this machine.
        UnsupportedModelError: Found, but not a causal language model that can be loaded safely.
        ConfigError: The asked device is not here, what spreads a model over several is not installed, or the asked
            weights cannot be had.
    """
    progress = progress or silent
    check_start()
    source = resolve(name)
    shadowing = shadowing_note(name, source)
    # before anything is fetched
    progress("Starting torch", 0, 0, "")
    devices.limit_threads()
    chosen_device = devices.choose_device(device)
    chosen_dtype, notes = devices.choose_dtype(dtype, chosen_device)
    folder = _folder_of(source, name, progress)
    notes = (*notes, *_notes_of(source, folder))
    contents = inspect(folder)
    if device == "auto" and chosen_device == "cuda":
        chosen_device = devices.roomy_place(contents.parameters, chosen_dtype, source.name)
        if is_spread(chosen_device):
            notes = (*notes, f"{source.name} fits on no single GPU, so it is spread over {chosen_device}")
    devices.check_memory(contents.parameters, chosen_dtype, chosen_device, source.name)
    contents_digest = _digest_of(folder, source, progress)
    progress(f"Loading {source.name}", 0, 0, "")
    from streamchat.kernels.library import allow
    from streamchat.kernels.library import kernels as compiled_kernels

    with quiet():
        from streamchat.decode.install import install
        from streamchat.models.fingerprint import know_contents
        from streamchat.models.quantize.cpu import use_weights
        from streamchat.quantization.linear import quantized_bytes

        _check_config(folder, contents, source)
        tokenizer = _load_tokenizer(folder, source)
        load = partial(_load_placed, folder, source, contents.parameters, attention=attention)
        model, chosen_device, load_notes = load(chosen_device, chosen_dtype)
        if chosen_dtype == "float16" and not _is_finite(model):
            safe = "bfloat16" if chosen_device != "cpu" or devices.cpu_has_bfloat16() else "float32"
            notes = (
                *_notes_of(source, folder),
                f"{source.name} overflows in float16, so it runs in {safe}",
            )
            del model
            devices.give_back_unused()
            chosen_dtype = safe
            devices.check_memory(contents.parameters, chosen_dtype, chosen_device, source.name)
            model, chosen_device, load_notes = load(chosen_device, chosen_dtype)
    progress(f"Loading {source.name}", 0, 0, "")
    allow(kernels)
    if chosen_device == "cpu":
        progress("Preparing kernels", 0, 0, "")
        compiled_kernels()
    if weights == "auto" and dtype == "float32":
        weights = "native"  # who asks for exact numbers gets them
    know_contents(model, contents_digest)
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


def _folder_of(source: Source, asked: str, progress: Progress) -> Path:
    """The local folder in transformers' form, fetched or converted where needed."""
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


def _notes_of(source: Source, folder: Path) -> tuple[str, ...]:
    """What the user should know about where the model came from."""
    if source.kind == "gguf":
        return tuple((read_manifest(folder) or {}).get("notes", ()))
    if source.kind == "hub-cache" and (note := older_note(source.repo_id, folder)):
        return (note,)
    return ()


def _digest_of(folder: Path, source: Source, progress: Progress) -> str:
    """The digest of all that weights are read from."""
    files = {*weight_files(folder), *folder.glob("adapter_*")}  # transformers loads an adapter beside the weights too
    return folder_digest(folder, files, name=source.name, progress=progress)


def _check_config(folder: Path, contents: Contents, source: Source) -> None:
    """Refuse, with the reason, what transformers cannot load as a causal language model."""
    import transformers
    from transformers.models.auto import modeling_auto

    kind = str(contents.config.get("model_type") or "")
    library: Any = modeling_auto
    configs: Any = transformers.CONFIG_MAPPING
    if kind not in configs:
        if contents.config.get("auto_map"):
            raise UnsupportedModelError(
                f"{source.name} ({kind or 'no model_type'}) needs program code from its own repository, which is never "
                "run; choose a model that transformers itself knows"
            )
        raise UnsupportedModelError(
            f"{source.name} is of type {kind!r}, which transformers {transformers.__version__} does not know; choose "
            "another model"
        )
    if kind not in library.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedModelError(
            f"{source.name} is of type {kind!r}, which transformers does not load as a causal language model; choose "
            "another model"
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


def _load_placed(
    folder: Path, source: Source, parameters: int, device: str, dtype: str, *, attention: str
) -> tuple[PreTrainedModel, str, tuple[str, ...]]:
    """The model, where it is, and notes. One that does not work on several GPUs is put on one that has room."""
    model, notes = _load_weights(folder, source, device, dtype, attention)
    if not is_spread(device):
        return model, device, notes
    from streamchat.models.spread import best_single, fault_of, spread_place

    place = spread_place(model, device, source.name)
    fault = fault_of(model)
    if not fault:
        return model, place, notes
    del model
    devices.give_back_unused()
    single = best_single(device)
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
        if "Cannot allocate memory" in str(error):  # safetensors has no error of its own for it
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
    """A missing weight is filled with random numbers, silently: the model would answer nonsense."""
    for kind, words in (("missing_keys", "lacks"), ("mismatched_keys", "has the wrong shape for")):
        if keys := sorted(str(key) for key in info.get(kind) or ()):
            raise UnsupportedModelError(
                f"{source.name} {words} {len(keys)} of the weights of a causal language model ({keys[0]} is the "
                "first), so it would answer nonsense; choose a complete model"
            )


def _is_finite(model: Any) -> bool:
    """Whether a few tokens pass through without overflowing; float16 ends at 65,504."""
    import torch

    ids = (
        torch.arange(8, device=model.get_input_embeddings().weight.device).unsqueeze(0)
        % model.config.get_text_config().vocab_size
    )
    with torch.inference_mode():
        return bool(torch.isfinite(model(ids, use_cache=False).logits).all())
