"""Tiny models whose norms, windows and caps differ from Llama's. Sequences of 32 tokens go past every window.

Hidden sizes are no squares, so that the factor on Gemma's embedding is no whole number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4Config,
    Glm4ForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
)

NO_PAD = {"pad_token_id": None}
"""torch gives the embedding of a padding token no gradient."""
GEMMA = {"hidden_size": 80, "head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 7} | NO_PAD
"""Scores and logits of so small a model come near to caps of 2 and 3."""
GEMMA3_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
}

NORMED: Mapping[str, tuple[type[PreTrainedModel], type[Any], Mapping[str, Any]]] = {
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma2_uncapped": (
        Gemma2ForCausalLM,
        Gemma2Config,
        GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False},
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        GEMMA | {"sliding_window_pattern": 3, "rope_parameters": GEMMA3_ROPES},
    ),
    "olmo2": (
        Olmo2ForCausalLM,
        Olmo2Config,
        NO_PAD | {"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "eos_token_id": None},
    ),
    "olmo2_bias": (
        Olmo2ForCausalLM,
        Olmo2Config,
        NO_PAD | {"attention_bias": True, "eos_token_id": None},
    ),
    "glm4": (Glm4ForCausalLM, Glm4Config, NO_PAD | {"head_dim": 16}),
    "glm4_no_bias": (
        Glm4ForCausalLM,
        Glm4Config,
        NO_PAD | {"head_dim": 16, "attention_bias": False, "tie_word_embeddings": True},
    ),
}
