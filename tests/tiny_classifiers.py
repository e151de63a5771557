"""Tiny sequence classifiers and reward models, one of each architecture that there is a family for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import (
    Gemma2Config,
    Gemma2ForSequenceClassification,
    Gemma3TextConfig,
    Gemma3TextForSequenceClassification,
    Glm4Config,
    Glm4ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    Ministral3Config,
    Ministral3ForSequenceClassification,
    MinistralConfig,
    MinistralForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    MixtralConfig,
    MixtralForSequenceClassification,
    Olmo2Config,
    Olmo2ForSequenceClassification,
    Phi3Config,
    Phi3ForSequenceClassification,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForSequenceClassification,
)

from tests.tiny_dense import DENSE, PHI3, YARN_ROPE
from tests.tiny_moe import MOE
from tests.tiny_normed import NORMED

PAD = 249
LABELS = {"num_labels": 1, "pad_token_id": PAD}

CLASSIFIERS: Mapping[str, tuple[type[PreTrainedModel], type[Any], Mapping[str, Any]]] = {
    "llama_classifier": (
        LlamaForSequenceClassification,
        LlamaConfig,
        # The flag is about a vocabulary head, which there is none of.
        {"num_labels": 3, "pad_token_id": PAD, "tie_word_embeddings": True, "rope_parameters": YARN_ROPE},
    ),
    "mistral_reward": (
        MistralForSequenceClassification,
        MistralConfig,
        {"num_labels": 1, "pad_token_id": PAD, "sliding_window": 7},
    ),
    "ministral_reward": (
        MinistralForSequenceClassification,
        MinistralConfig,
        {"num_labels": 1, "pad_token_id": PAD, "head_dim": 12, "layer_types": ["full_attention"] * 4},
    ),
    "qwen2_reward": (Qwen2ForSequenceClassification, Qwen2Config, {"num_labels": 1, "pad_token_id": PAD}),
    "qwen3_classifier": (Qwen3ForSequenceClassification, Qwen3Config, {"head_dim": 24, "pad_token_id": PAD}),
    "phi3_classifier": (Phi3ForSequenceClassification, Phi3Config, {**PHI3, "num_labels": 5, "pad_token_id": PAD}),
    "gemma2_reward": (Gemma2ForSequenceClassification, Gemma2Config, {**NORMED["gemma2"][2], **LABELS}),
    "gemma3_classifier": (
        Gemma3TextForSequenceClassification,
        Gemma3TextConfig,
        {**NORMED["gemma3"][2], **LABELS, "num_labels": 3},
    ),
    "glm4_reward": (Glm4ForSequenceClassification, Glm4Config, {**NORMED["glm4"][2], **LABELS}),
    "olmo2_reward": (Olmo2ForSequenceClassification, Olmo2Config, {**NORMED["olmo2"][2], **LABELS}),
    "ministral3_reward": (
        Ministral3ForSequenceClassification,
        Ministral3Config,
        {**DENSE["ministral3"][2], **LABELS},
    ),
    "mixtral_reward": (MixtralForSequenceClassification, MixtralConfig, {**MOE["mixtral_window"][2], **LABELS}),
    "qwen3_moe_classifier": (
        Qwen3MoeForSequenceClassification,
        Qwen3MoeConfig,
        {**MOE["qwen3_moe_mixed"][2], **LABELS, "num_labels": 4},
    ),
}
