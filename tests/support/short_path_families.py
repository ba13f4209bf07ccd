"""The families that have a short path: one list for every test of that path."""

from __future__ import annotations

import transformers

from tests.support.families import FAMILIES

COMPILED = (
    "llama",
    "llama_linear",
    "llama_llama3",
    "llama_dynamic",
    "llama_yarn",
    "gpt_neox",
    "qwen2",
    "qwen3",
    "qwen2_moe",
    "qwen3_moe",
    "mistral",
    "mixtral",
    "mistral_window_16",
    "mistral_window_64",
    "ministral3",
    "starcoder2",
    "phi",
    "phi3",
    "phi3_longrope",
    "gemma",
    "gemma2_window_16",
    "gemma2_window_64",
    "gemma3_window_16",
    "gemma3_window_64",
    "cohere",
    "cohere2_window_16",
    "cohere2_window_64",
    "glm",
    "glm4",
    "gptj",
    "falcon",
    "falcon_new",
    "smollm3",
    "olmo",
    "olmoe",
    "olmo2",
    "olmo3_window_16",
    "stablelm",
    "granite",
    "granitemoe",
    "granitemoe_shared",
    "exaone4_window_16",
    "ernie4_5",
    "helium",
    "seed_oss",
    "arcee",
    "nemotron",
)
"""Families that have a short path of compiled kernels; a family that loses it fails here."""
# GPT-J has sdpa in newer versions of transformers only, and the short path needs it
WITHOUT_SDPA = () if transformers.GPTJForCausalLM._supports_sdpa else ("gptj",)
AVAILABLE = [name for name in COMPILED if FAMILIES[name].available and name not in WITHOUT_SDPA]
WITHOUT_RECORDED = ("llama_dynamic", "phi3_longrope")
"""Their rotary frequencies depend on the length, so that no step on a GPU is recorded."""
WITHOUT_FUSED = (*WITHOUT_RECORDED, "qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "granitemoe", "granitemoe_shared")
"""The fused kernels on a GPU do not compute mixtures of experts either."""
