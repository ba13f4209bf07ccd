"""The reader of each supported family, by the class of the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from streamchat.decode.families.blocks import AFTER, AROUND, AROUND_GLM, ONE, Family, read_blocks
from streamchat.decode.families.errors import UnsupportedPartError
from streamchat.decode.families.gpt import read_falcon, read_gptj, read_neox
from streamchat.decode.spec import ModelSpec

Reader = Callable[[Any], ModelSpec]


def _blocks(**differences: Any) -> Reader:
    return functools.partial(read_blocks, family=Family(**differences))


def _always(layer: Any) -> bool:
    return True


def _is_parallel(layer: Any) -> bool:
    return bool(layer.use_parallel_residual)


def _slides(attention: Any) -> bool:
    return attention.sliding_window is not None


def _slides_or_all_do_not(attention: Any) -> bool:
    return attention.sliding_window is None or bool(attention.is_sliding)


def _uses_rope(attention: Any) -> bool:
    return bool(attention.use_rope)


READERS: dict[str, Reader] = {
    **dict.fromkeys(
        (
            "ArceeForCausalLM",
            "Ernie4_5ForCausalLM",
            "GemmaForCausalLM",
            "GlmForCausalLM",
            "GraniteForCausalLM",
            "GraniteMoeForCausalLM",
            "GraniteMoeSharedForCausalLM",
            "HeliumForCausalLM",
            "LlamaForCausalLM",
            "Ministral3ForCausalLM",
            "MistralForCausalLM",
            "MixtralForCausalLM",
            "NemotronForCausalLM",
            "OlmoForCausalLM",
            "OlmoeForCausalLM",
            "Phi3ForCausalLM",
            "Qwen2ForCausalLM",
            "Qwen2MoeForCausalLM",
            "Qwen3ForCausalLM",
            "Qwen3MoeForCausalLM",
            "SeedOssForCausalLM",
            "Starcoder2ForCausalLM",
        ),
        _blocks(),
    ),
    "Gemma2ForCausalLM": _blocks(norms=AROUND, softcaps=True),
    "Gemma3ForCausalLM": _blocks(norms=AROUND, softcaps=True),
    "Glm4ForCausalLM": _blocks(norms=AROUND_GLM),
    "Olmo2ForCausalLM": _blocks(norms=AFTER),
    "Olmo3ForCausalLM": _blocks(norms=AFTER),
    "Exaone4ForCausalLM": _blocks(norms=AFTER, has_positions=_slides_or_all_do_not),
    "CohereForCausalLM": _blocks(norms=ONE, parallel=_always),
    "Cohere2ForCausalLM": _blocks(norms=ONE, parallel=_always, has_positions=_slides),
    "PhiForCausalLM": _blocks(norms=ONE, parallel=_always),
    "StableLmForCausalLM": _blocks(parallel=_is_parallel),
    "SmolLM3ForCausalLM": _blocks(has_positions=_uses_rope),
    "FalconForCausalLM": read_falcon,
    "GPTJForCausalLM": read_gptj,
    "GPTNeoXForCausalLM": read_neox,
}
_EAGER = {"Gemma2ForCausalLM"}
"""Families that transformers computes with eager attention, because of their soft caps."""


def model_spec(model: Any) -> ModelSpec | None:
    """Return the spec of `model` (a causal LM of transformers, in eval mode); None if it is not supported.

    The classes themselves are matched: subclasses and classes of the same name from elsewhere are not supported.
    """
    name = type(model).__name__
    read = READERS.get(name)
    attentions = ("sdpa", "eager") if name in _EAGER else ("sdpa",)
    if read is None or not type(model).__module__.startswith("transformers.models."):
        return None
    if model.config._attn_implementation not in attentions:
        return None
    try:
        with torch.no_grad():
            return read(model)
    except (UnsupportedPartError, AttributeError):  # other releases of transformers may name parts differently
        return None
