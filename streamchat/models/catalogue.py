"""Short names for models, for `--model`."""

from __future__ import annotations

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

TEMPLATE_ARGS: dict[str, dict[str, Any]] = {
    # These models reason for longer than a reply may be (`max_new_tokens`) unless they are told not to.
    "Qwen/Qwen3-0.6B": {"enable_thinking": False},
    "Qwen/Qwen3-1.7B": {"enable_thinking": False},
}
"""Hub id -> arguments that the model's chat template gets unless the user gives others."""


def template_args(name: str) -> dict[str, Any]:
    """Return the arguments that the chat template of the model `name`, an alias or a Hub id, gets by default."""
    known = {hub_id.lower(): arguments for hub_id, arguments in TEMPLATE_ARGS.items()}
    return dict(known.get((lookup(name) or name).lower(), {}))


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
