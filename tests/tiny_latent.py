"""Tiny models with experts as DeepSeek's: multi-latent attention with and without a query latent, groups of experts.

The first layer is dense. Contexts before YaRN are 16 tokens, and no two sizes of a head are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    PreTrainedModel,
)

EXPERTS: Mapping[str, Any] = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 1,
}
LATENT: Mapping[str, Any] = {
    **EXPERTS,
    "num_key_value_heads": 8,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,  # so that frequencies of every kind are among so few: kept, mixed, divided
    "factor": 4.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
    "beta_fast": 2.0,
    "beta_slow": 0.25,
    "original_max_position_embeddings": 16,
}
POWERS_OF_TWO = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 4, "v_head_dim": 8}
"""Sizes that the fused rotary kernel on a GPU can have."""
V3 = {**LATENT, "num_mtp_layers": 0}
GLM: Mapping[str, Any] = {**EXPERTS, "num_mtp_layers": 0, "head_dim": 12}
MOONLIGHT: Mapping[str, Any] = {
    **V3,
    "q_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
    "rms_norm_eps": 1e-2,  # far from that of the latent norms
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
}

LATENT_MODELS: Mapping[str, tuple[type[PreTrainedModel], type[Any], Mapping[str, Any]]] = {
    "deepseek_v3": (DeepseekV3ForCausalLM, DeepseekV3Config, {**V3, "rope_parameters": YARN}),
    # Groups that megatron-core would rank by one expert, and a scale of the softmax that mscale alone does not tell.
    "deepseek_v3_groups": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        {
            **V3,
            **POWERS_OF_TWO,
            "topk_group": 3,
            "norm_topk_prob": False,
            "rope_parameters": {**YARN, "mscale_all_dim": 0.0},
        },
    ),
    "moonlight": (DeepseekV3ForCausalLM, DeepseekV3Config, MOONLIGHT),
    "deepseek_v3_all_moe": (DeepseekV3ForCausalLM, DeepseekV3Config, {**V3, "first_k_dense_replace": 0}),
    "deepseek_v2": (
        DeepseekV2ForCausalLM,
        DeepseekV2Config,
        {**LATENT, "topk_method": "group_limited_greedy", "rope_parameters": YARN},
    ),
    "deepseek_v2_lite": (DeepseekV2ForCausalLM, DeepseekV2Config, {**LATENT, **POWERS_OF_TWO, "q_lora_rank": None}),
    "glm4_moe": (Glm4MoeForCausalLM, Glm4MoeConfig, {**GLM, "attention_bias": True, "use_qk_norm": True}),
    "glm4_moe_air": (
        Glm4MoeForCausalLM,
        Glm4MoeConfig,
        {**GLM, "n_group": 1, "topk_group": 1, "partial_rotary_factor": 1.0, "norm_topk_prob": False},
    ),
}
