"""Checkpoints of real models' shapes with random weights, made at the speed of the disk; or of holes, in no time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mcore.bridge.dist_writer import bytes_of
from mcore.bridge.families import dims_of, family_of_config
from mcore.bridge.hf_tensors import part_name
from mcore.bridge.hf_writer import SafetensorsWriter, TensorSpec, create_shards, divide_into_shards
from mcore.bridge.plan import steps_of

POOL_BYTES = 64 * 2**20
"""Random numbers to choose from: making as many as a model has would take longer than all that is measured."""
BLOCK_BYTES = 2**20
SHARD_BYTES = 5_000_000_000

_QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6}
_OLMOE = {"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "hidden_act": "silu", "rms_norm_eps": 1e-5}

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "dense-1gb": _QWEN2  # Qwen2.5-0.5B
    | {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "dense-15gb": _QWEN2  # Qwen2.5-7B
    | {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    },
    "dense-30gb": _QWEN2  # Qwen2.5-14B
    | {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40,
        "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False,
    },
    "moe-1gb": _OLMOE  # OLMoE-1B-7B with fewer experts and layers
    | {
        "hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": 50304, "num_experts": 32, "num_experts_per_tok": 8,
        "tie_word_embeddings": False,
    },
    "moe-14gb": _OLMOE  # OLMoE-1B-7B
    | {
        "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": 50304, "num_experts": 64, "num_experts_per_tok": 8,
        "tie_word_embeddings": False,
    },
    "deepseek-v3": {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_act": "silu",
        "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
        "num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129280, "rms_norm_eps": 1e-6,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
        "first_k_dense_replace": 3, "moe_layer_freq": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 1, "rope_theta": 10000,
        "max_position_embeddings": 163840, "attention_bias": False, "tie_word_embeddings": False,
        "rope_scaling": {
            "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
    },
}  # fmt: skip
"""`config.json` of each shape that can be asked for; sizes are those of bfloat16."""


def specs_of(config: Mapping[str, Any], dtype: str = "bfloat16") -> dict[str, TensorSpec]:
    """All tensors of the model's files, by name."""
    dims = dims_of(config)
    specs: dict[str, TensorSpec] = {}
    for step in steps_of(family_of_config(config), dims):
        for name, shape in zip(step.hf_names, step.rule.hf_shapes(dims), strict=True):
            part = part_name(name)
            if part.index is not None:
                shape = (dims.size("experts"), *(reversed(shape) if part.transposed else shape))
            specs[part.tensor] = TensorSpec(part.tensor, dtype, shape)
    return specs


def write_model(folder: Path, config: Mapping[str, Any], *, sparse: bool = False, seed: int = 0) -> int:
    """Make a Hugging Face folder in bfloat16.

    Args:
        folder: The folder to make.
        config: Its `config.json`.
        sparse: Whether the files are holes: of full length, but they take no room and hold zeros.
        seed: Chooses the numbers.

    Returns:
        Bytes of all tensors.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}, indent=2))
    specs = specs_of(config)
    places = create_shards(folder, divide_into_shards(specs.values(), SHARD_BYTES))
    if not sparse:
        generator = torch.Generator().manual_seed(seed)
        pool = torch.empty(POOL_BYTES // 2, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        writer = SafetensorsWriter(places)
        for spec in specs.values():
            writer.write_blocks(spec.name, 0, _blocks(bytes_of(pool), spec.num_bytes, generator))
        writer.close()
    return sum(spec.num_bytes for spec in specs.values())


def _blocks(pool: memoryview, num_bytes: int, generator: torch.Generator) -> Iterator[memoryview]:
    """Pieces of the pool from random places on, so that no two rows of a model are alike."""
    for start in range(0, num_bytes, BLOCK_BYTES):
        size = min(BLOCK_BYTES, num_bytes - start)
        place = 2 * int(torch.randint((len(pool) - size) // 2, (), generator=generator))
        yield pool[place : place + size]
