"""Known models: their short names for `--model`, and the sampling settings that their makers advise."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamchat.base import suggestions

DEFAULT = "default"
BUNDLED = (DEFAULT, "smollm2", "smollm2-135m", "smollm2-135m-instruct")
"""Names of the bundled default model."""

_PYTHIA_SIZES = ("14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")
# 14m and 31m have no deduped version.
_PYTHIA = {
    f"pythia-{size}{kind}": f"EleutherAI/pythia-{size}{kind}"
    for kind in ("", "-deduped")
    for size in _PYTHIA_SIZES
    if not (kind and size in ("14m", "31m"))
}

ALIASES: dict[str, str] = {
    **_PYTHIA,
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "gemma-3-1b": "google/gemma-3-1b-it",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "phi-3-mini": "microsoft/Phi-3-mini-4k-instruct",
    "olmo2-1b": "allenai/OLMo-2-0425-1B-Instruct",
}
"""Alias -> Hub id."""


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model before it is fetched. Counts are rounded."""

    parameters: int
    context_length: int
    """Tokens that it was trained with."""


def _facts(millions: float, context_length: int) -> ModelFacts:
    return ModelFacts(round(millions * 1e6), context_length)


_PYTHIA_MILLIONS = (14.1, 30.5, 70.4, 162.3, 405.3, 1012, 1415, 2775, 6857, 11846)
FACTS: Mapping[str, ModelFacts] = {
    DEFAULT: _facts(134.5, 8192),
    **{
        f"pythia-{size}{kind}": _facts(millions, 2048)
        for size, millions in zip(_PYTHIA_SIZES, _PYTHIA_MILLIONS, strict=True)
        for kind in ("", "-deduped")
        if f"pythia-{size}{kind}" in _PYTHIA
    },
    "smollm2-360m": _facts(361.8, 8192),
    "smollm2-1.7b": _facts(1711, 8192),
    "qwen2.5-0.5b": _facts(494, 32768),
    "qwen2.5-1.5b": _facts(1544, 32768),
    "qwen3-0.6b": _facts(596, 40960),
    "qwen3-1.7b": _facts(1721, 40960),
    "llama-3.2-1b": _facts(1236, 131072),
    "llama-3.2-3b": _facts(3213, 131072),
    "gemma-3-1b": _facts(1000, 32768),
    "tinyllama": _facts(1100, 2048),
    "phi-3-mini": _facts(3821, 4096),
    "olmo2-1b": _facts(1485, 4096),
}
"""Alias -> facts, for lists."""

_SMOLLM2 = {"temperature": 0.2, "top_p": 0.9}
_QWEN25 = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}
_QWEN3 = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
_LLAMA32 = {"temperature": 0.6, "top_p": 0.9}
_GEMMA3 = {"temperature": 1.0, "top_p": 0.95, "top_k": 64}

SAMPLING: Mapping[str, Mapping[str, float | int]] = {
    # the example of the model cards
    "SmolLM2-135M-Instruct": _SMOLLM2,
    "SmolLM2-360M-Instruct": _SMOLLM2,
    "SmolLM2-1.7B-Instruct": _SMOLLM2,
    # generation_config.json
    "Qwen2.5-0.5B-Instruct": _QWEN25,
    "Qwen2.5-1.5B-Instruct": _QWEN25,
    # "Best Practices" in the model cards, for thinking mode; generation_config.json has the same
    "Qwen3-0.6B": _QWEN3,
    "Qwen3-1.7B": _QWEN3,
    # generation_config.json
    "Llama-3.2-1B-Instruct": _LLAMA32,
    "Llama-3.2-3B-Instruct": _LLAMA32,
    # top_k and top_p as in generation_config.json, which lists no temperature: transformers' is then 1
    "gemma-3-1b-it": _GEMMA3,
    # the example of the model card
    "TinyLlama-1.1B-Chat-v1.0": {"temperature": 0.7, "top_p": 0.95, "top_k": 50},
}
"""Name of a model -> what its makers advise, for copies without a generation_config that says it."""
TEMPLATE_ARGS: Mapping[str, Mapping[str, Any]] = {
    # These models reason for longer than a reply may be (`max_new_tokens`) unless they are told not to.
    "Qwen3-0.6B": {"enable_thinking": False},
    "Qwen3-1.7B": {"enable_thinking": False},
}
"""Name of a model -> arguments that its chat template gets unless the user gives others."""
_QUANTIZATION = re.compile(r"[-._](i?q\d\w*|tq\d\w*|[bf]+(16|32)|fp16|mxfp4\w*)$", re.IGNORECASE)
"""End of the name of a GGUF file: `-Q4_K_M`, `.f16`."""
_BY_LOWER_NAME = {name.lower(): values for name, values in SAMPLING.items()}
_ARGS_BY_LOWER_NAME = {name.lower(): values for name, values in TEMPLATE_ARGS.items()}


def sampling_of(name: str) -> Mapping[str, float | int]:
    """Return the advice for a Hub id, or a file or folder with the name of a known model; empty if it is not known."""
    return _BY_LOWER_NAME.get(_plain(name), {})


def template_args_of(name: str) -> Mapping[str, Any]:
    """Return the arguments that the chat template of a model gets by default; `name` as for `--model`."""
    return _ARGS_BY_LOWER_NAME.get(_plain((lookup(name) or name).removesuffix(".gguf")), {})


def _plain(name: str) -> str:
    """Return the name of a model in lower case without owner, folders and quantization."""
    return _QUANTIZATION.sub("", name.rpartition("/")[2].removesuffix("-GGUF")).lower()


def lookup(name: str) -> str | None:
    """Return the Hub id of the alias `name` (in any case), or None."""
    return ALIASES.get(name.lower())


def is_bundled(name: str) -> bool:
    """Return whether `name` means the bundled default model."""
    return name.lower() in BUNDLED


def did_you_mean(name: str) -> str:
    """Return `; did you mean pythia-410m?`, or '' if no alias is similar."""
    known = {alias: alias for alias in (*BUNDLED, *ALIASES)}
    # the user may have misspelled a Hub id
    known |= {hub_id.lower(): alias for alias, hub_id in ALIASES.items()}
    known |= {hub_id.lower().partition("/")[2]: alias for alias, hub_id in ALIASES.items()}
    return suggestions.did_you_mean(name.lower(), known, show=known.__getitem__, cutoff=0.75)
