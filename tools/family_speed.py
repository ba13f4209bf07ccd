"""The short path of each family, and its speed against transformers' forward pass; part of `tools.family_table`."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from streamchat.cache.arguments import cache_keyword
from streamchat.cache.hook import StreamingHook
from streamchat.cache.positions.fit import PositionFit
from streamchat.cache.positions.strategy import choose_fit, make_cache
from streamchat.cache.streaming import StreamingCache
from streamchat.decode.install import install, uninstall
from streamchat.decode.static import static_step
from streamchat.kernels.library import Kernels, load_kernels
from streamchat.reports.machine import processor
from tests.support.families import FAMILIES, build, text
from tests.support.tiny import fresh_model

HIDDEN, LAYERS, HEADS = 512, 8, 8
BUDGET, ROUNDS, TOKENS = 64, 5, 12
_SIZES: dict[str, int] = {
    "hidden_size": HIDDEN,
    "n_embd": HIDDEN,
    "num_attention_heads": HEADS,
    "n_head": HEADS,
    "num_hidden_layers": LAYERS,
    "n_layer": LAYERS,
    "intermediate_size": 1408,
    "moe_intermediate_size": 704,
    "shared_expert_intermediate_size": 1408,
    "shared_intermediate_size": 1408,
    "head_dim": HIDDEN // HEADS,
}


@dataclass(frozen=True)
class ShortPath:
    """The steps that compute one token of a family, and their speed."""

    cpu: str
    gpu: str
    speed: float | None
    """Speed on this CPU as a multiple of transformers' forward pass; None without a short path."""


def measured() -> dict[str, Any]:
    """Return the figures that the page states about the measurement."""
    return {
        "hidden": HIDDEN,
        "layers": LAYERS,
        "speed_budget": BUDGET,
        "rounds": ROUNDS,
        "tokens": TOKENS,
        "processor": processor(),
    }


def short_path(name: str) -> ShortPath:
    """Return the short paths of a family and the speed of the better one on this CPU."""
    kernels = load_kernels("auto")
    model = build(name, FAMILIES[name].attentions[0])
    steps = {_installed(model, kernels), _installed(model, None)} - {""}
    gpu = "-" if static_step(model) is None else "recorded"
    return ShortPath(", ".join(sorted(steps)) or "-", gpu, _speed(name, kernels) if steps else None)


def _installed(model: Any, kernels: Kernels | None) -> str:
    """Return which step `install` chooses on a CPU; '' for none."""
    if not install(model, kernels):
        return ""
    kind = type(model.forward.step).__name__
    uninstall(model)
    return "compiled" if kind == "CompiledStep" else "torch"


def _speed(name: str, kernels: Kernels | None) -> float:
    """Return how many times as fast the short path is."""
    model = _mid_size(name)
    fit = choose_fit(model)
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(ROUNDS):
        for is_short in times:
            if is_short:
                install(model, kernels)
            times[is_short].append(_time_per_token(model, fit))
            uninstall(model)
    return min(times[False]) / min(times[True])


def _mid_size(name: str) -> Any:
    """Return a model of the family with random weights."""
    family = FAMILIES[name]
    changes: dict[str, Any] = {key: value for key, value in _SIZES.items() if key in family.settings}
    kinds = family.settings.get("layer_types")
    if kinds:
        changes["layer_types"] = [kinds[index % len(kinds)] for index in range(LAYERS)]
    if "no_rope_layers" in family.settings:
        changes["no_rope_layers"] = [1, 1, 1, 0] * (LAYERS // 4)
    if "short_factor" in family.settings.get("rope_parameters", {}):
        half = HIDDEN // HEADS // 2
        factors = {"short_factor": [1.0] * half, "long_factor": [2.0] * half}
        changes["rope_parameters"] = {**family.settings["rope_parameters"], **factors}
    torch.manual_seed(0)
    model = fresh_model(family.config(**changes), attn_implementation=family.attentions[0], dtype=torch.bfloat16)
    return model.requires_grad_(False)


def _time_per_token(model: Any, fit: PositionFit) -> float:
    """Return the shortest time of one token on a full cache, in seconds."""
    size = BUDGET if fit.position_limit is None else min(BUDGET, fit.position_limit // 2)
    cache: StreamingCache = make_cache(model, fit, cache_size=size, num_sink_tokens=4)
    key, ids, shortest = cache_keyword(model), text(size + TOKENS), float("inf")
    with torch.inference_mode(), StreamingHook(model, cache):
        model(input_ids=ids[:, :size], use_cache=True, logits_to_keep=1, **{key: cache})
        for index in range(size, size + TOKENS):
            start = perf_counter()
            model(input_ids=ids[:, index : index + 1], use_cache=True, logits_to_keep=1, **{key: cache})
            shortest = min(shortest, perf_counter() - start)
    return shortest
