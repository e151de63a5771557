"""Small random models of every family, with each tensor drawn at random.

transformers starts norms at one and biases at zero, which hides swapped norms and lost biases. Here nothing is at a
special value. Scales are chosen so that a fault costs about what it costs in a real model: embeddings are small (the
norms' epsilon counts), every layer adds to the residual, and logits spread over a few units.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1000000.0}

SIZES: dict[str, Any] = {
    "vocab_size": 515,  # padded to 640: no multiple of anything
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 131072,
}


YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
}
"""Prompts go far past its original context; with the usual betas a head so small has no frequency between them."""

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35],
    "long_factor": [1.0, 2.0, 3.5, 5.0, 6.0, 8.0, 11.0, 16.0],
}

PHI3_CONTEXT = {"max_position_embeddings": 128}
"""Eight times the original context. longrope's factor on queries and keys, which sharpens the softmax and with it the
noise of fp32, grows with the ratio; it is 1.32 here and 1.19 in Phi-3."""

GEMMA = {
    "hidden_size": 80,
    "query_pre_attn_scalar": 20,
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 40}

DEEPSEEK = {
    "head_dim": 8,  # the rotated part, as the config class has it
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
ROUTED = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 1,
}
DEEPSEEK_YARN = YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}

FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("LlamaConfig", {"rms_norm_eps": 1e-5, "rope_parameters": LLAMA3_ROPE}),
    "qwen2": ("Qwen2Config", {"rms_norm_eps": 1e-6, "rope_parameters": PLAIN_ROPE}),
    # Heads wider than hidden / heads.
    "qwen3": ("Qwen3Config", {"rms_norm_eps": 1e-6, "rope_parameters": PLAIN_ROPE, "head_dim": 24}),
    "mistral": ("MistralConfig", {"sliding_window": 9, "rope_parameters": YARN | {"attention_factor": 1.3}}),
    "ministral": (
        "MinistralConfig",
        {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "ministral3": (
        "Ministral3Config",
        {"pad_token_id": 0, "rope_parameters": YARN | {"llama_4_scaling_beta": 0.3}},
    ),
    "phi3": (
        "Phi3Config",
        {"pad_token_id": 0, "original_max_position_embeddings": 16, "rope_parameters": LONGROPE} | PHI3_CONTEXT,
    ),
    "gemma2": ("Gemma2Config", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": (
        "Gemma3TextConfig",
        GEMMA
        | {
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
            },
        },
    ),
    "glm4": ("Glm4Config", {"pad_token_id": 0}),
    "olmo2": ("Olmo2Config", {"rms_norm_eps": 1e-3}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2MoeConfig", EXPERTS | {"shared_expert_intermediate_size": 56, "norm_topk_prob": False}),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS | {"norm_topk_prob": True}),
    "olmoe": ("OlmoeConfig", EXPERTS | {"num_key_value_heads": 4, "eos_token_id": 1, "norm_topk_prob": False}),
    "gpt_oss": (
        "GptOssConfig",
        {
            "intermediate_size": 64,  # square, as in the real model
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 12,
            "swiglu_limit": 1.0,  # low enough for a tiny model's activations to be clamped
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": YARN | {"truncate": False},
        },
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        DEEPSEEK | ROUTED | {"topk_method": "group_limited_greedy", "rope_parameters": DEEPSEEK_YARN},
    ),
    "deepseek_v3": ("DeepseekV3Config", DEEPSEEK | ROUTED | {"rope_parameters": DEEPSEEK_YARN}),
    "glm4_moe": ("Glm4MoeConfig", ROUTED | {"use_qk_norm": True, "attention_bias": True}),
}
"""The config class in transformers of each family, and what its tiny model needs beside `SIZES`."""


def tiny_config(family: str, **changes: Any) -> Any:
    """A transformers config of a tiny model.

    Args:
        family: A family's name, as in `FAMILIES`.
        changes: Fields of the config to set otherwise.

    Raises:
        KeyError: No such family.
    """
    import transformers

    name, own = FAMILIES[family]
    # A config class moves fields inside of the mappings that it is given.
    return getattr(transformers, name)(**deepcopy({**SIZES, **own, "tie_word_embeddings": False, **changes}))


def tiny_model(config: Any, seed: int) -> Any:
    """A transformers model of this config in fp32, every tensor drawn at random by its name and the seed."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        biases = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("correction_bias")]
        for name, parameter in (*model.named_parameters(), *biases):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}.{name}".encode()))
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_scaled(name, noise, tied=config.tie_word_embeddings))
    return model


def _scaled(name: str, noise: Tensor, *, tied: bool) -> Tensor:
    if "norm" in name:
        return noise.mul(0.2).add(1)
    if name.endswith(("bias", "sinks")):
        return noise.mul(0.3)
    if "embed" in name:
        # A tied embedding is the head as well, so it can't be as small.
        return noise.mul(0.15 if tied else 0.03)
    return noise.mul((2.5 if "lm_head" in name else 1.0) / noise.shape[-1] ** 0.5)


def write_tiny_model(folder: Path, family: str, seed: int, *, max_shard_size: str = "50GB", **changes: Any) -> Path:
    """Write such a model as a Hugging Face folder, without tokenizer; give back the folder.

    Args:
        folder: Where to write.
        family: As in `tiny_config`.
        seed: The same seed gives the same weights.
        max_shard_size: Largest safetensors file, as transformers spells it.
        changes: Fields of the config to set otherwise.
    """
    tiny_model(tiny_config(family, **changes), seed).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
