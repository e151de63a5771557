"""Tiny models with experts, all layers or some; routed so that each of the experts gets some of a hundred tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
FOUR = {"num_experts": 4, "num_experts_per_tok": 2}
QWEN2 = {
    **FOUR,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 56,
}
QWEN3 = {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 40, "head_dim": 24}
OLMOE = {**FOUR, "eos_token_id": 1}
WINDOW = {"use_sliding_window": True, "sliding_window": 12}
GPT_OSS = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 24,
    "sliding_window": 12,
    "swiglu_limit": 1.5,  # low enough for a tiny model's activations to be clamped
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "beta_fast": 2.0,
        "beta_slow": 0.5,
        "truncate": False,
        "original_max_position_embeddings": 16,
    },
}

MOE: Mapping[str, tuple[type[PreTrainedModel], type[Any], Mapping[str, Any]]] = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, MIXTRAL),
    "mixtral_window": (MixtralForCausalLM, MixtralConfig, {**MIXTRAL, "head_dim": 24, "sliding_window": 12}),
    "qwen2_moe": (Qwen2MoeForCausalLM, Qwen2MoeConfig, QWEN2),
    "qwen2_moe_mixed": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        {
            **QWEN2,
            **WINDOW,
            "max_window_layers": 2,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "qkv_bias": False,
        },
    ),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {**QWEN3, "norm_topk_prob": True}),
    "qwen3_moe_first_dense": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {**QWEN3, "mlp_only_layers": [0]}),
    "qwen3_moe_mixed": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {
            **QWEN3,
            **FOUR,
            **WINDOW,
            "num_experts_per_tok": 3,
            "mlp_only_layers": [0, 2],
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, OLMOE),
    "olmoe_bias": (OlmoeForCausalLM, OlmoeConfig, {**OLMOE, "norm_topk_prob": True, "attention_bias": True}),
    "gpt_oss": (GptOssForCausalLM, GptOssConfig, GPT_OSS),
}
