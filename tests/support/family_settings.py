"""Tiny random-weight configurations of the model families, and what the cache must do with each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import transformers

Served = Literal["rotation", "no positions", "recompute", "refused"]
VOCABULARY = 160


@dataclass(frozen=True)
class Family:
    """One configuration."""

    name: str
    config_class: str
    """In the namespace of transformers."""
    settings: Mapping[str, Any]
    served: Served = "rotation"
    reason: str = ""
    """A pattern of the refusal's text."""
    sdpa: bool = True
    """Whether transformers has scaled-dot-product attention for it."""
    chunks: bool = True
    """Whether several tokens on a filled cache are right in the library itself (on a CPU)."""
    sinks_seen: bool = True
    """Whether any query attends to the sinks, rotated, once the budget is full: not through a smaller window."""
    in_one_text: Mapping[str, Any] | None = field(default_factory=dict)
    """Settings with which positions beyond the budget mean the same, so that a whole text can be read in one forward;
    None where one forward and many give different results in the library itself."""

    @property
    def attentions(self) -> list[str]:
        """The attention implementations to test."""
        return ["sdpa", "eager"] if self.sdpa else ["eager"]

    @property
    def available(self) -> bool:
        """Whether the installed transformers has it."""
        return hasattr(transformers, self.config_class)

    def config(self, **changes: Any) -> Any:
        """A new configuration."""
        return getattr(transformers, self.config_class)(**{**self.settings, **changes})


IDS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # the builder sets the spread of the logits by the output weights alone
    "tie_word_embeddings": False,
}
HEADS = {**IDS, "hidden_size": 64, "num_attention_heads": 4}
# The three ways in which configurations spell their sizes.
PLAIN = {**HEADS, "intermediate_size": 96, "num_hidden_layers": 3, "max_position_embeddings": 4096}
GROUPED = {**PLAIN, "num_key_value_heads": 2}
OPENAI = {**IDS, "n_embd": 64, "n_layer": 3, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
WIDE_HEADS = {**GROUPED, "head_dim": 16}
GRANITE = {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "embedding_multiplier": 2.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    **PLAIN,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "first_k_dense_replace": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
}
LINEAR_HEADS = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
STATES = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_d_conv": 4}
SHARED = {
    **WIDE_HEADS,
    "num_hidden_layers": 4,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]


def rope(kind: str = "default", **parameters: Any) -> dict[str, Any]:
    """Rotary parameters as a configuration takes them."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


def llama(name: str, *, one_text: bool = True, positions: int = 4096, **parameters: Any) -> Family:
    """A Llama with rotary parameters."""
    settings = {**GROUPED, "max_position_embeddings": positions, **rope(**parameters)}
    return Family(name, "LlamaConfig", settings, in_one_text={} if one_text else None)


def mistral(name: str, window: int | None, **more: Any) -> Family:
    """A Mistral whose layers all have this window."""
    return Family(name, "MistralConfig", {**GROUPED, "sliding_window": window}, **more)


def two_kinds(name: str, config_class: str, window: int, more: Mapping[str, Any] | None = None, **flags: Any) -> Family:
    """A family with sliding and full layers."""
    settings = {**WIDE_HEADS, "sliding_window": window, "layer_types": ALTERNATING, **(more or {})}
    return Family(name, config_class, settings, **flags)


def served(how: Served, *families: Family) -> list[Family]:
    """These families, all served like that."""
    return [replace(family, served=how) for family in families]


ROTARY = [
    llama("llama"),
    llama("llama_linear", kind="linear", factor=4.0),
    llama(
        "llama_llama3",
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    ),
    llama("llama_dynamic", kind="dynamic", factor=2.0, positions=64, one_text=False),
    llama("llama_yarn", kind="yarn", factor=4.0, original_max_position_embeddings=64, positions=256),
    Family("gpt_neox", "GPTNeoXConfig", {**PLAIN, **rope(partial_rotary_factor=0.25)}),
    Family("qwen2", "Qwen2Config", GROUPED),
    Family("qwen2_moe", "Qwen2MoeConfig", {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 32}),
    Family("qwen3", "Qwen3Config", WIDE_HEADS),
    Family("qwen3_moe", "Qwen3MoeConfig", {**WIDE_HEADS, **EXPERTS}),
    mistral("mistral", None),
    mistral("mistral_window_16", 16, sinks_seen=False),
    mistral("mistral_window_64", 64),
    # scales its queries by the absolute position from 64 on
    Family(
        "ministral3",
        "Ministral3Config",
        {
            **WIDE_HEADS,
            "max_position_embeddings": 256,
            **rope(
                "yarn",
                factor=4.0,
                beta_fast=32.0,
                beta_slow=1.0,
                mscale=1.0,
                mscale_all_dim=1.0,
                original_max_position_embeddings=64,
                llama_4_scaling_beta=0.1,
            ),
        },
        in_one_text=None,
    ),
    Family("mixtral", "MixtralConfig", {**GROUPED, "sliding_window": None, "num_local_experts": 4}),
    Family("olmoe", "OlmoeConfig", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}),
    Family("starcoder2", "Starcoder2Config", {**GROUPED, "sliding_window": None}),
    Family("phi", "PhiConfig", {**GROUPED, **rope(partial_rotary_factor=0.5)}),
    Family("phi3", "Phi3Config", GROUPED),
    Family(
        "phi3_longrope",
        "Phi3Config",
        {
            **GROUPED,
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 64,
            **rope(
                "longrope",
                factor=8.0,
                original_max_position_embeddings=64,
                short_factor=[1.0 + 0.05 * i for i in range(8)],
                long_factor=[1.0 + 2.0 * i for i in range(8)],
            ),
        },
        in_one_text=None,
    ),
    Family("gemma", "GemmaConfig", WIDE_HEADS),
    two_kinds("gemma2_window_16", "Gemma2Config", 16, {"query_pre_attn_scalar": 16}, sdpa=False),
    two_kinds("gemma2_window_64", "Gemma2Config", 64, {"query_pre_attn_scalar": 16}, sdpa=False),
    two_kinds("gemma3_window_16", "Gemma3TextConfig", 16, {"query_pre_attn_scalar": 16}),
    two_kinds("gemma3_window_64", "Gemma3TextConfig", 64, {"query_pre_attn_scalar": 16}),
    Family("cohere", "CohereConfig", {**GROUPED, "logit_scale": 1.0, "use_qk_norm": True}),
    # full layers without positions: sinks have nothing to turn, windows do not see them (as in EXAONE 4)
    two_kinds("cohere2_window_16", "Cohere2Config", 16, {"logit_scale": 1.0}, sinks_seen=False),
    two_kinds("cohere2_window_64", "Cohere2Config", 64, {"logit_scale": 1.0}),
    Family("glm", "GlmConfig", WIDE_HEADS),
    Family("glm4", "Glm4Config", WIDE_HEADS),
    Family("gptj", "GPTJConfig", {**OPENAI, "rotary_dim": 8, "n_positions": 128}, in_one_text=None),
    Family("codegen", "CodeGenConfig", {**OPENAI, "rotary_dim": 8, "n_positions": 128}, in_one_text=None),
    Family(
        "falcon",
        "FalconConfig",
        {**PLAIN, "alibi": False, "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False},
    ),
    Family(
        "falcon_new", "FalconConfig", {**PLAIN, "num_kv_heads": 2, "alibi": False, "new_decoder_architecture": True}
    ),
    Family("smollm3", "SmolLM3Config", {**GROUPED, "num_hidden_layers": 4, "no_rope_layers": [1, 1, 0, 1]}),
    Family("olmo", "OlmoConfig", GROUPED),
    Family("olmo2", "Olmo2Config", GROUPED),
    two_kinds("olmo3_window_16", "Olmo3Config", 16),
    Family("stablelm", "StableLmConfig", {**GROUPED, **rope(partial_rotary_factor=0.25)}),
    Family(
        "granite",
        "GraniteConfig",
        {**GROUPED, **GRANITE},
    ),
    Family("granitemoe", "GraniteMoeConfig", {**GROUPED, **GRANITE, "num_local_experts": 4}),
    Family(
        "granitemoe_shared",
        "GraniteMoeSharedConfig",
        {**GROUPED, **GRANITE, "num_local_experts": 4, "shared_intermediate_size": 32},
    ),
    two_kinds("exaone4_window_16", "Exaone4Config", 16, sinks_seen=False),
    Family("ernie4_5", "Ernie4_5Config", WIDE_HEADS),
    Family("helium", "HeliumConfig", WIDE_HEADS),
    Family("seed_oss", "SeedOssConfig", WIDE_HEADS),
    Family("arcee", "ArceeConfig", GROUPED),
    Family("nemotron", "NemotronConfig", {**WIDE_HEADS, **rope(partial_rotary_factor=0.5)}),
    Family("minimax_m2", "MiniMaxM2Config", {**WIDE_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Family("nanochat", "NanoChatConfig", GROUPED),  # turns the other way, and normalises the turned keys
    two_kinds(
        "gpt_oss_window_16",
        "GptOssConfig",
        16,
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            **rope(
                "yarn",
                factor=4.0,
                beta_fast=32.0,
                beta_slow=1.0,
                truncate=False,
                original_max_position_embeddings=1024,
            ),
        },
        sdpa=False,
    ),
    Family("deepseek_v2", "DeepseekV2Config", {**LATENT, "head_dim": 8}),
    Family("deepseek_v3", "DeepseekV3Config", LATENT),
    Family(
        "llama4",
        "Llama4TextConfig",
        {
            **WIDE_HEADS,
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 96,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 4096,
            "no_rope_layers": [1, 1, 1, 0],
            "interleave_moe_layer_step": 2,
            "attn_temperature_tuning": True,
            "floor_scale": 16,
            "attn_scale": 0.1,
        },
        in_one_text=None,  # scales its queries by the position in the text
    ),
]
HYBRID = [
    Family(
        "qwen3_next",
        "Qwen3NextConfig",
        {
            **WIDE_HEADS,
            **LINEAR_HEADS,
            **EXPERTS,
            "num_hidden_layers": 4,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        },
    ),
    Family("falcon_h1", "FalconH1Config", {**WIDE_HEADS, **STATES, "mamba_d_ssm": 64, "mamba_chunk_size": 16}),
    Family(
        "lfm2",
        "Lfm2Config",
        {**GROUPED, "layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    ),
    Family(
        "bamba",
        "BambaConfig",
        {**GROUPED, **STATES, "mamba_expand": 1, "mamba_chunk_size": 16, "attn_layer_indices": [1]},
    ),
]
POSITION_FREE = served(
    "no positions",
    Family("falcon_alibi", "FalconConfig", {**PLAIN, "alibi": True, "multi_query": False, "parallel_attn": False}),
    Family("bloom", "BloomConfig", {**IDS, "hidden_size": 64, "n_layer": 3, "n_head": 4}, sdpa=False),
    Family(
        "mpt",
        "MptConfig",
        {**IDS, "d_model": 64, "n_layers": 3, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2},
        sdpa=False,
        in_one_text={"max_seq_len": 128},
    ),
    Family(
        "jamba",
        "JambaConfig",
        {
            **GROUPED,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
        chunks=False,
    ),
)
LEARNED = served(
    "recompute",
    Family("gpt2", "GPT2Config", {**OPENAI, "n_positions": 64}),
    Family("gpt_bigcode", "GPTBigCodeConfig", {**OPENAI, "n_positions": 64}),
    Family("opt", "OPTConfig", {**HEADS, "num_hidden_layers": 3, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    Family(
        "xglm",
        "XGLMConfig",
        {**IDS, "d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 64},
        sdpa=False,
    ),
    # a weighted norm behind the rotation: not a rotation any more
    Family("hunyuan_dense", "HunYuanDenseV1Config", WIDE_HEADS),
)
REFUSED = served(
    "refused",
    Family(
        "mamba",
        "MambaConfig",
        {**IDS, "hidden_size": 64, "state_size": 8, "num_hidden_layers": 2},
        reason="a state of constant size and no keys and values, so there is nothing to evict",
        sdpa=False,
    ),
    Family(
        "deepseek_v32",
        "DeepseekV32Config",
        LATENT,
        reason="uses a DynamicIndexedLayer, which does not support eviction",
    ),
    # later layers read the keys of earlier ones and have none of their own
    Family(
        "gemma3n",
        "Gemma3nTextConfig",
        {
            **SHARED,
            "num_kv_shared_layers": 2,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "activation_sparsity_pattern": [0.0] * 4,
            "intermediate_size": [96] * 4,
        },
        reason="layer 2 has no keys and values",
    ),
    Family(
        "gemma4_shared",
        "Gemma4TextConfig",
        {
            **SHARED,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
        },
        reason="layer 2 has no keys and values",
    ),
    Family(
        "nemotron_h",
        "NemotronHConfig",
        {
            **WIDE_HEADS,
            "layers_block_type": ["mamba", "attention", "mlp"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
            "chunk_size": 16,
        },
        reason="layer 2 has no keys and values",
    ),
    # recurrent layers beside learned positions: nothing can be moved, and nothing can be read again
    Family(
        "recurrent_gemma",
        "RecurrentGemmaConfig",
        {**WIDE_HEADS, "lru_width": 64, "attention_window_size": 32, "num_key_value_heads": 1},
        reason="its recurrent state cannot be rebuilt",
        sdpa=False,
    ),
)
