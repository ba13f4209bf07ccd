"""Which classes of transformers a decode step supports, and how each is read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from streamchat.decode.families import readers
from streamchat.decode.families.modules import UnreadableError
from streamchat.decode.families.readers import (
    glm4_block,
    outputs_block,
    parallel_block,
    plain_block,
    read_model,
    sandwich_block,
)
from streamchat.decode.spec import ModelSpec

Reader = Callable[[Any], ModelSpec | None]

_PLAIN: Reader = partial(read_model, block=plain_block)
_PLAIN_IN_PAIRS: Reader = partial(read_model, block=plain_block, interleaved=True)
_PARALLEL: Reader = partial(read_model, block=parallel_block)
_OUTPUTS: Reader = partial(read_model, block=outputs_block)

READERS: dict[str, Reader] = {
    "ArceeForCausalLM": _PLAIN,
    "CohereForCausalLM": readers.cohere,
    "Cohere2ForCausalLM": readers.cohere,
    "Ernie4_5ForCausalLM": _PLAIN_IN_PAIRS,
    "Exaone4ForCausalLM": _OUTPUTS,
    "FalconForCausalLM": readers.falcon,
    "GemmaForCausalLM": partial(readers.gemma, block=plain_block),
    "Gemma2ForCausalLM": partial(readers.gemma, block=sandwich_block),
    "Gemma3ForCausalLM": partial(readers.gemma, block=sandwich_block),
    "GlmForCausalLM": _PLAIN_IN_PAIRS,
    "Glm4ForCausalLM": partial(read_model, block=glm4_block, interleaved=True),
    "GPTJForCausalLM": readers.gptj,
    "GPTNeoXForCausalLM": readers.neox,
    "GraniteForCausalLM": readers.granite,
    "HeliumForCausalLM": _PLAIN_IN_PAIRS,
    "LlamaForCausalLM": _PLAIN,
    "Ministral3ForCausalLM": _PLAIN,
    "MistralForCausalLM": _PLAIN,
    "NemotronForCausalLM": _PLAIN,
    "OlmoForCausalLM": _PLAIN,
    "Olmo2ForCausalLM": _OUTPUTS,
    "Olmo3ForCausalLM": _OUTPUTS,
    "PhiForCausalLM": _PARALLEL,
    "Phi3ForCausalLM": _PLAIN,
    "Qwen2ForCausalLM": _PLAIN,
    "Qwen3ForCausalLM": _PLAIN,
    "SeedOssForCausalLM": _PLAIN,
    "SmolLM3ForCausalLM": _PLAIN,
    "StableLmForCausalLM": _PARALLEL,
    "Starcoder2ForCausalLM": _PLAIN,
}
LAYER_TYPES = {"full_attention", "sliding_attention"}


def model_spec(model: Any) -> ModelSpec | None:
    """Return the spec of `model` (a causal LM of transformers, in eval mode); None if it is not supported.

    The classes themselves are matched: subclasses and classes of the same name from elsewhere are not supported.
    """
    read = READERS.get(type(model).__name__)
    if read is None or not type(model).__module__.startswith("transformers.models.") or not _is_known(model):
        return None
    try:
        return read(model)
    except UnreadableError:
        return None


def _is_known(model: Any) -> bool:
    """Return whether its layers attend in ways that a step computes."""
    # where transformers has sdpa for a model, another attention was chosen for a reason
    usual = "sdpa" if getattr(model, "_supports_sdpa", True) else "eager"
    types = getattr(model.config, "layer_types", None) or ()
    return model.config._attn_implementation == usual and set(types) <= LAYER_TYPES
