"""Families whose blocks have an attention `self_attn` and an MLP `mlp`: Llama and most others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from streamchat.decode.families.errors import UnsupportedPartError
from streamchat.decode.families.experts import has_experts, read_experts
from streamchat.decode.families.norms import norm_spec
from streamchat.decode.families.parts import Place, embedding_scale, first_of, read_mlp, separate_attention
from streamchat.decode.families.rotaries import read_rotaries
from streamchat.decode.spec import AttentionSpec, BlockSpec, ExpertsSpec, MlpSpec, ModelSpec


@dataclass(frozen=True)
class NormNames:
    """Names of the norms of a block; '' for none."""

    input: str = "input_layernorm"
    attention_out: str = ""
    mlp: str = "post_attention_layernorm"
    mlp_out: str = ""


BEFORE = NormNames()
"""Before attention and MLP (Llama)."""
AFTER = NormNames("", "post_attention_layernorm", "", "post_feedforward_layernorm")
"""After both (OLMo 2)."""
AROUND = NormNames(
    attention_out="post_attention_layernorm", mlp="pre_feedforward_layernorm", mlp_out="post_feedforward_layernorm"
)
"""Before and after both (Gemma 2)."""
AROUND_GLM = NormNames(attention_out="post_self_attn_layernorm", mlp_out="post_mlp_layernorm")
ONE = NormNames(mlp="")
"""One norm for attention and MLP (Cohere)."""


def _always(attention: Any) -> bool:
    return True


@dataclass(frozen=True)
class Family:
    """How the blocks of a family differ from those of Llama."""

    norms: NormNames = BEFORE
    parallel: Callable[[Any], bool] = lambda layer: False
    """Block -> whether its MLP gets the input of the block."""
    has_positions: Callable[[Any], bool] = _always
    """Attention -> whether it rotates queries and keys."""
    softcaps: bool = False
    """Whether `config` may name soft caps of scores and logits."""


def read_blocks(model: Any, family: Family = Family()) -> ModelSpec:
    """Return the description of a model whose blocks have `self_attn` and `mlp`.

    Raises:
        UnsupportedPartError: A part is not supported.
    """
    body, config = model.base_model, model.config
    embedding = model.get_input_embeddings()
    width = embedding.weight.shape[1]
    rotaries = read_rotaries(model)
    return ModelSpec(
        embedding=embedding,
        rotaries=rotaries.calls,
        blocks=tuple(
            _block(layer, Place(config, index, rotaries), family, width) for index, layer in enumerate(body.layers)
        ),
        norm=norm_spec(first_of(body, "norm", "final_layernorm"), width, device=embedding.weight.device),
        head=model.get_output_embeddings(),
        dtype=model.dtype,
        embedding_scale=_embedding_scale(model, embedding, width),
        logit_scale=_logit_scale(model),
        logit_softcap=getattr(config, "final_logit_softcapping", None) if family.softcaps else None,
    )


def _block(layer: Any, place: Place, family: Family, width: int) -> BlockSpec:
    parallel = family.parallel(layer)
    names = replace(family.norms, mlp="") if parallel else family.norms
    device = next(layer.parameters()).device
    input_norm, attention_out, mlp_norm, mlp_out = (
        norm_spec(getattr(layer, name), width, device=device) if name else None
        for name in (names.input, names.attention_out, names.mlp, names.mlp_out)
    )
    return BlockSpec(
        input_norm=input_norm,
        attention=_attention(layer.self_attn, place, family),
        mlp_norm=mlp_norm,
        mlp=_mlp(layer, place),
        attention_out_norm=attention_out,
        mlp_out_norm=mlp_out,
        parallel=parallel,
        residual_scale=float(getattr(layer, "residual_multiplier", 1.0)),
    )


def _mlp(layer: Any, place: Place) -> MlpSpec | ExpertsSpec:
    mlp = first_of(layer, "mlp", "block_sparse_moe")
    if not has_experts(mlp):
        return read_mlp(mlp)
    return read_experts(mlp, place.config.num_experts_per_tok, getattr(layer, "shared_mlp", None))


def _attention(attention: Any, place: Place, family: Family) -> AttentionSpec:
    spec = separate_attention(attention, place, family.has_positions(attention))
    softcap = getattr(place.config, "attn_logit_softcapping", None) if family.softcaps else None
    if softcap is not None and place.config._attn_implementation != "eager":
        raise UnsupportedPartError("transformers applies soft caps to scores only in eager attention")
    return replace(spec, softcap=softcap)


def _embedding_scale(model: Any, embedding: Any, width: int) -> float:
    """Return the factor on the embeddings: Granite's, that of the embedding module, or Gemma's in older versions."""
    multiplier = getattr(model.base_model, "embedding_multiplier", None)
    if multiplier is not None:
        return float(multiplier)
    is_gemma = type(model).__name__.startswith("Gemma")
    return embedding_scale(embedding, width**0.5 if is_gemma else 1.0)


def _logit_scale(model: Any) -> float:
    """Return the factor on the logits (Cohere), or the reciprocal of the divisor (Granite)."""
    divisor = getattr(model.config, "logits_scaling", None)
    return float(getattr(model, "logit_scale", 1.0)) if divisor is None else 1.0 / divisor
