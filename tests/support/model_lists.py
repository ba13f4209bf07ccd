"""A list of models with fixed figures."""

from __future__ import annotations

from streamchat.frontend.model_list import ModelList
from streamchat.models.choices import ModelChoice

MB = 1_000_000


def _alias(name: str, parameters: float, context: int) -> ModelChoice:
    repo_id = f"EleutherAI/{name}"
    return ModelChoice(name, repo_id, "hub", repo_id, False, int(2 * parameters), int(4.2 * parameters), context)


LIST = ModelList(
    (
        ModelChoice("default", "SmolLM2-135M-Instruct", "bundled", "a scripted engine", True, 105 * MB, 110 * MB, 8192),
        ModelChoice("./tiny", "in this folder", "here", "/home/me/tiny", True, 12 * MB, 25 * MB, 2048),
        _alias("pythia-410m", 405.3e6, 2048),
        ModelChoice(
            "bartowski/Llama-3.2-1B-Instruct-GGUF/Llama-3.2-1B-Instruct-Q4_K_M.gguf",
            "in the local Hub cache",
            "hub-cache",
            "bartowski/Llama-3.2-1B-Instruct-GGUF/Llama-3.2-1B-Instruct-Q4_K_M.gguf",
            True,
            808 * MB,
            848 * MB,
            131072,
        ),
        *(_alias(f"pythia-{size}", millions * 1e6, 2048) for size, millions in (("1b", 1012), ("2.8b", 2775))),
        _alias("pythia-12b", 11846e6, 2048),
        *(_alias(f"other-{number}", number * 1e8, 4096) for number in range(1, 14)),
    ),
    8000 * MB,
    "a scripted engine",
)
"""The default model in use, local ones, and some that must be fetched; 8 GB are free."""
