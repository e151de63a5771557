"""Tiny dense models beside the plain ones: rotary embeddings of every kind, windows, biases, fused tensors, heads.

Contexts are short, so that sequences of 40 tokens go past windows and past the length before scaling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 50.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
}
"""With the usual betas and theta so short a context and so small a head would have no frequency between the bounds."""
YARN_FRACTIONAL_ROPE = YARN_ROPE | {"truncate": False, "mscale": 0.7, "mscale_all_dim": 0.3, "beta_fast": 1.5}
YARN_WITH_FACTOR = YARN_ROPE | {"attention_factor": 1.3}
LONG_FACTORS = [1.0, 2.0, 3.5, 5.0, 6.0, 8.0, 11.0, 16.0]


def longrope(num_frequencies: int, original: int) -> dict[str, Any]:
    """Rope parameters of Phi-3 that divide each frequency by its own number, one set short, one long."""
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": original,
        "short_factor": [1.0 + 0.05 * number for number in range(num_frequencies)],
        "long_factor": LONG_FACTORS[:num_frequencies],
    }


PHI3: Mapping[str, Any] = {"pad_token_id": 0, "hidden_size": 128, "original_max_position_embeddings": 16}

DENSE: Mapping[str, tuple[type[PreTrainedModel], type[Any], Mapping[str, Any]]] = {
    "llama_attention_bias": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True}),
    "llama_mlp_bias": (LlamaForCausalLM, LlamaConfig, {"mlp_bias": True}),
    "llama_dynamic": (
        LlamaForCausalLM,
        LlamaConfig,
        {"rope_parameters": DYNAMIC_ROPE, "max_position_embeddings": 16},
    ),
    "llama_yarn": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": YARN_FRACTIONAL_ROPE}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 7, "head_dim": 12}),
    "mistral_full": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "mistral_yarn": (MistralForCausalLM, MistralConfig, {"sliding_window": 9, "rope_parameters": YARN_WITH_FACTOR}),
    "ministral": (
        MinistralForCausalLM,
        MinistralConfig,
        {"head_dim": 12, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "ministral3": (
        Ministral3ForCausalLM,
        Ministral3Config,
        {"head_dim": 12, "pad_token_id": 0, "rope_parameters": YARN_ROPE | {"llama_4_scaling_beta": 0.3}},
    ),
    "qwen2_window": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3},
    ),
    "qwen2_yarn": (Qwen2ForCausalLM, Qwen2Config, {"rope_parameters": YARN_ROPE}),
    "qwen3_bias": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 24, "attention_bias": True}),
    "qwen3_window": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {
            "head_dim": 24,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "phi3": (Phi3ForCausalLM, Phi3Config, {**PHI3, "sliding_window": 9}),
    "phi3_long": (Phi3ForCausalLM, Phi3Config, {**PHI3, "rope_parameters": longrope(8, 16)}),
    "phi3_short": (
        Phi3ForCausalLM,
        Phi3Config,
        {**PHI3, "original_max_position_embeddings": 64, "rope_parameters": longrope(8, 64)},
    ),
    "phi4_partial": (
        Phi3ForCausalLM,
        Phi3Config,
        {**PHI3, "tie_word_embeddings": True, "rope_parameters": longrope(6, 16) | {"partial_rotary_factor": 0.75}},
    ),
}
