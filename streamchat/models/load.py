"""Loads a model by name: plan, read, retry, and prepare for decoding."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamchat.base.progress import Progress as Progress
from streamchat.base.progress import silent
from streamchat.config.settings import Decode, KvDtype, Settings
from streamchat.models.adapters import digest_with, find_adapters
from streamchat.models.contents import folder_digest
from streamchat.models.folder import weight_files
from streamchat.models.light.libraries import collections_paused, import_libraries
from streamchat.models.limits import check_start
from streamchat.models.quiet import quiet
from streamchat.models.resolve import resolve
from streamchat.models.sampling import SamplingAdvice, sampling_advice
from streamchat.telemetry import trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from streamchat.decode.steps import StepReport
    from streamchat.kernels.library import Kernels
    from streamchat.models.plan import LoadPlan


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
    kernels: Kernels | None = field(default=None, repr=False)
    """The compiled kernels that it decodes with on a CPU; None for PyTorch's."""
    cache_dtype: str = ""
    """The dtype of cached keys and values; "int8" or "int4" if they are quantized."""
    advice: SamplingAdvice = field(default_factory=SamplingAdvice)
    """The sampling settings that its makers advise."""
    decode: Decode = "auto"
    """The setting that it was loaded with."""
    step: StepReport | None = None
    """The step that computes new tokens."""


def load_model(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "sdpa",
    weights: str = "native",
    kernels: str = "auto",
    decode: Decode = "auto",
    kv_dtype: KvDtype = "native",
    adapter: str = "",
    progress: Progress = silent,
) -> LoadedModel:
    """Load the model that `name` means; fetch or convert it first if needed. Prints nothing.

    Args:
        name: `default`, an alias, a Hub id, a GGUF file of the Hub, a folder or a .gguf file.
        device: `auto`, `cpu`, `mps`, `cuda`, `cuda:1`, `cuda:0,1` or `cuda:all`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        attention: `sdpa` or `eager`; a model without sdpa gets eager, with a note.
        weights: `auto`, `native`, `int8` or `int4`, see `use_weights`.
        kernels: `auto`: compiled kernels on a CPU if there is a compiler; `torch`: PyTorch's kernels.
        decode: `auto`, `fused`, `graph` or `plain`: the step for new tokens, see `install`.
        kv_dtype: `auto`, `native`, `int8`, `k8v4`, or `int4`: how keys and values are cached, see `choose_kv_dtype`.
        adapter: Folders of LoRA adapters to merge into the weights, as in the setting; '' for none.
        progress: Called with the stage; may raise to cancel.

    Raises:
        ModelNotFoundError: The model was not found, cannot be fetched, is damaged, or does not fit on this machine.
        UnsupportedModelError: The model was found, but is not a causal language model that can be loaded safely.
        ConfigError: The device is not available, accelerate or peft is needed and not installed, or the weights are
            not possible here.
    """
    with collections_paused():
        return _load(name, device, dtype, attention, weights, kernels, decode, kv_dtype, adapter, progress)


def _load(
    name: str,
    device: str,
    dtype: str,
    attention: str,
    weights: str,
    kernels: str,
    decode: Decode,
    kv_dtype: KvDtype,
    adapter: str,
    progress: Progress,
) -> LoadedModel:
    """Implements `load_model`."""
    check_start()
    source, adapters = resolve(name), find_adapters(adapter)
    progress("Starting torch", 0, 0, "")
    import torch

    from streamchat.models.plan import make_plan

    trace.mark(trace.TORCH)
    with torch.inference_mode(False):  # if the caller is in it, its tensors would be of no use outside
        plan = make_plan(
            source,
            name,
            device=device,
            dtype=dtype,
            attention=attention,
            weights=weights,
            kernels=kernels,
            adapters=adapters,
            progress=progress,
        )
        return _load_planned(plan, dtype, weights, kernels, decode, kv_dtype, progress)


def _load_planned(
    plan: LoadPlan, dtype: str, weights: str, kernels: str, decode: Decode, kv_dtype: KvDtype, progress: Progress
) -> LoadedModel:
    """Load what `plan` says; the other arguments are those of `load_model`."""
    from streamchat.models.plan import KERNELS_STAGE

    digest = digest_with(_digest_of(plan.folder, plan.name, progress), plan.adapters, progress)
    if weights == "auto" and dtype == "float32":
        weights = "native"  # float32 was requested: do not quantize
    if kv_dtype == "auto" and dtype == "float32":
        kv_dtype = "native"
    progress(f"Loading {plan.name}", 0, 0, "")
    import_libraries(str(plan.contents.config.get("model_type")))
    trace.mark(trace.TRANSFORMERS)
    with quiet():
        from streamchat.cache.dtype import dtype_named, set_cache_dtype
        from streamchat.cache.layers.mover import set_mover
        from streamchat.decode.install import is_compiled
        from streamchat.decode.mover import CompiledMover
        from streamchat.decode.report import step_report
        from streamchat.kernels.library import load_kernels, why_unavailable
        from streamchat.models.checked_step import install_checked
        from streamchat.models.device import choose_cache_dtype
        from streamchat.models.fallback import load_weights
        from streamchat.models.fingerprint import set_contents_digest
        from streamchat.models.kv_choice import choose_kv_dtype
        from streamchat.models.quantize.cpu import use_weights
        from streamchat.models.quantize.served_copy import (
            can_be_served,
            make_served_copy,
            served_folder,
            with_copy,
        )
        from streamchat.models.read import check_config, read_tokenizer
        from streamchat.quantization.linear import quantized_bytes

        check_config(plan)
        copy = None
        if plan.device == "cpu" and (plan.tiles is None or plan.adapters) and weights != "native":
            copy = served_folder(plan, digest, weights)
            plan = with_copy(plan, copy, kernels, progress)
        trace.mark(trace.MODULES)
        tokenizer = read_tokenizer(plan)
        trace.mark(trace.TOKENIZER)
        model, done = load_weights(plan, progress)
    trace.mark(trace.WEIGHTS)
    progress(f"Loading {done.name}", 0, 0, "")
    compiled = None
    if done.device == "cpu":
        progress(KERNELS_STAGE, 0, 0, "")
        compiled = load_kernels(kernels)
    set_contents_digest(model, digest)
    used, weight_notes = use_weights(
        model,
        tokenizer,
        weights,
        device=done.device,
        name=done.name,
        kernels=kernels,
        progress=progress,
        decode=decode,
    )
    step_notes = install_checked(model, compiled, used, decode)
    is_new = copy is not None and done.tiles != copy and done.dtype == plan.dtype and can_be_served(model)
    if copy is not None and is_new and make_served_copy(model, copy, done.name, progress):
        del model  # from now on without native weights, as in later starts
        model, done = load_weights(replace(done, kernels=compiled, tiles=copy, merged=True), progress)
        set_contents_digest(model, digest)
        step_notes = install_checked(model, compiled, used, decode)
    trace.mark(trace.CHECKS)
    cache_dtype = choose_cache_dtype(dtype, done.dtype, done.device, is_compiled(model))
    cache_dtype, kv_notes = choose_kv_dtype(model, tokenizer, kv_dtype, cache_dtype, weights=used, name=done.name)
    set_cache_dtype(model, dtype_named(cache_dtype))
    if compiled is not None:
        set_mover(model, CompiledMover(compiled))
    step = step_report(model, decode, why_unavailable(kernels) if done.device == "cpu" and compiled is None else "")
    step_notes = step_notes or tuple(filter(None, [step.note(decode)]))
    progress(f"Loading {done.name}", 0, 0, "")
    advice = sampling_advice(plan.source, plan.folder)
    return LoadedModel(
        model,
        tokenizer,
        done.name,
        done.source.origin,
        done.device,
        done.dtype,
        (*done.dtype_notes, *done.notes, *weight_notes, *step_notes, *kv_notes, *advice.notes),
        used,
        quantized_bytes(model),
        compiled,
        cache_dtype,
        advice,
        decode,
        step,
    )


def load_from_settings(settings: Settings, progress: Progress = silent, **changes: Any) -> LoadedModel:
    """Load the model that `settings` name, in the way that they say; `changes` replace single settings."""
    chosen = replace(settings, **changes)
    return load_model(
        chosen.model,
        device=chosen.device,
        dtype=chosen.dtype,
        attention=chosen.attention,
        weights=chosen.weights,
        kernels=chosen.kernels,
        decode=chosen.decode,
        kv_dtype=chosen.kv_dtype,
        adapter=chosen.adapter,
        progress=progress,
    )


def _digest_of(folder: Path, name: str, progress: Progress) -> str:
    """Return the digest of all files that weights are loaded from."""
    # transformers also loads an adapter next to the weights
    files = {*weight_files(folder), *folder.glob("adapter_*")}
    return folder_digest(folder, files, name=name, progress=progress)
