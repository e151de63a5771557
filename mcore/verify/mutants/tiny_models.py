"""Small random models of every family, with each tensor drawn at random.

transformers starts norms at one and biases at zero, which hides swapped norms and lost biases. Here nothing is at a
special value. Scales are chosen so that a fault costs about what it costs in a real model: embeddings are small (the
norms' epsilon counts), every layer adds to the residual, and logits spread over a few units.
"""

from __future__ import annotations

import zlib
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


def tiny_config(family: str, **changes: Any) -> Any:
    """A transformers config of a tiny model.

    Args:
        family: `llama` (with Llama 3's rope scaling), `qwen2` or `qwen3` (whose heads are wider than hidden / heads).
        changes: Fields of the config to set otherwise.

    Raises:
        KeyError: No such family.
    """
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    cls, own = {
        "llama": (LlamaConfig, {"rms_norm_eps": 1e-5, "rope_parameters": LLAMA3_ROPE}),
        "qwen2": (Qwen2Config, {"rms_norm_eps": 1e-6, "rope_parameters": PLAIN_ROPE}),
        "qwen3": (Qwen3Config, {"rms_norm_eps": 1e-6, "rope_parameters": PLAIN_ROPE, "head_dim": 24}),
    }[family]
    return cls(**(SIZES | own | {"tie_word_embeddings": False} | changes))


def tiny_model(config: Any, seed: int) -> Any:
    """A transformers model of this config in fp32, every tensor drawn at random by its name and the seed."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}.{name}".encode()))
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_scaled(name, noise, tied=config.tie_word_embeddings))
    return model


def _scaled(name: str, noise: Tensor, *, tied: bool) -> Tensor:
    if "norm" in name:
        return noise.mul(0.2).add(1)
    if name.endswith("bias"):
        return noise.mul(0.3)
    if "embed" in name:
        # A tied embedding is the head as well, so it can't be as small.
        return noise.mul(0.15 if tied else 0.03)
    return noise.mul((2.5 if "lm_head" in name else 1.0) / noise.shape[1] ** 0.5)


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
