"""Tiny Hugging Face models with every tensor perturbed, and megatron models with the same weights.

Random-initialised norms are all ones and biases all zeros, which hides swapped or dropped ones: here nothing is.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.core_model_loading import revert_weight_conversion

from mcore.bridge.families import dims_of, family_of_config
from mcore.bridge.hf_tensors import part_name
from mcore.bridge.plan import global_shape, steps_of
from tests.tiny_classifiers import CLASSIFIERS
from tests.tiny_dense import DENSE
from tests.tiny_latent import LATENT_MODELS
from tests.tiny_moe import MOE
from tests.tiny_normed import NORMED

SIZES = {
    "vocab_size": 250,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
PADDED_VOCAB_SIZE = 384
"""Rows: at TP2 the second rank holds 192 of which 58 are real; at TP4 the last one holds nothing but padding."""

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 24,
}
"""Every number differs from those that megatron-core has fixed, and the short context makes all three bands occur."""
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}

MODELS: Mapping[str, tuple[type[PreTrainedModel], type[Any], Mapping[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"rms_norm_eps": 1e-5}),
    "llama_bias": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama3": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama_linear": (LlamaForCausalLM, LlamaConfig, {"rope_parameters": LINEAR_ROPE}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2_tied": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 24}),
    "qwen3_tied": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 24, "tie_word_embeddings": True}),
}


def tiny_hf_model(
    name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model of `MODELS`, `DENSE` or `NORMED` in eval mode, and the mapping of its `config.json`."""
    model_class, config_class, options = {**MODELS, **DENSE, **CLASSIFIERS, **NORMED, **LATENT_MODELS, **MOE}[name]
    # A config class moves fields inside of the mappings that it is given.
    hf_config = config_class(**deepcopy({**SIZES, **options}), attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    model = model_class(hf_config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in parameter_name:
                parameter.copy_(1 + 0.3 * noise)
            elif parameter_name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        router_biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
        for bias in router_biases:
            bias.copy_(0.3 * torch.randn(bias.shape, generator=generator))
    config = hf_config.to_dict() | {"architectures": [model_class.__name__]}
    model.to(dtype)
    # `to` rounds the rotary frequencies as well, which a model loaded in bf16 keeps in fp32.
    model.model.rotary_emb = type(model.model.rotary_emb)(hf_config)
    return model, config


def mcore_tensors(
    model: PreTrainedModel,
    hf_config: Mapping[str, Any],
    *,
    padded_vocab_size: int,
    more: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The model's weights as a megatron checkpoint names and stacks them, made by the bridge's rules.

    `more` are tensors of its files, by name, that the model itself does not have.
    """
    dims = dims_of(hf_config, make_vocab_size_divisible_by=padded_vocab_size)
    state = {**revert_weight_conversion(model, model.state_dict()), **(more or {})}  # as files have it
    tensors: dict[str, Tensor] = {}
    for step in steps_of(family_of_config(hf_config), dims):
        parts = [_part(state, name) for name in step.hf_names]
        if step.mcore_key not in tensors:
            tensors[step.mcore_key] = parts[0].new_zeros(global_shape(step, dims))
        tensors[step.mcore_key][step.index] = step.rule.to_mcore(parts, dims)
    return tensors


def _part(state: Mapping[str, Tensor], name: str) -> Tensor:
    part = part_name(name)
    tensor = state[part.tensor] if part.index is None else state[part.tensor][part.index]
    return tensor.T if part.transposed else tensor


@torch.no_grad()
def fill(model: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy this rank's parts of global tensors into a megatron model, by its own sharded state dict."""
    state = model.sharded_state_dict()
    apply_factories(state)
    for part in nested_values(state):
        if isinstance(part, ShardedTensor):
            assert tuple(part.global_shape) == tuple(tensors[part.key].shape), part.key
            part.data.copy_(tensors[part.key][part.global_slice()].reshape(part.data.shape))
    assert all(not parameter.isnan().any() for parameter in model.parameters())
