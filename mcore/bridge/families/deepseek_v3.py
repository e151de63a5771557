"""DeepSeek-V3 and R1, and Moonlight: a sigmoid router with a correction bias, and layers for further tokens.

Source: transformers 5.19 `modeling_deepseek_v3.py`; megatron-core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore.bridge.families import deepseek, deepseek_moe
from mcore.bridge.rules import Family
from mcore.findings import together

ONLY: Mapping[str, tuple[Any, ...]] = {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}


def transformer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of megatron's `MLATransformerConfig`.

    Raises:
        ConfigError: What can't be built; lists every key.
    """
    return together(
        lambda: deepseek.latent_transformer_config(config, ONLY), lambda: deepseek_moe.sigmoid_router(config)
    )


FAMILY = Family(
    name="deepseek_v3",
    hf_architecture="DeepseekV3ForCausalLM",
    hf_model_type="deepseek_v3",
    needed=(
        "num_key_value_heads",
        "q_lora_rank",
        "first_k_dense_replace",
        "routed_scaling_factor",
        "n_group",
        "topk_group",
    ),
    rules=deepseek.RULES,
    tied_hf=deepseek_moe.TIED,
    transformer_config=transformer_config,
    sizes=lambda config: deepseek.sizes(config, router_bias=True),
    features=deepseek_moe.sigmoid_features,
)
