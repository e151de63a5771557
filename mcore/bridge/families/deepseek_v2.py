"""DeepSeek-V2 and V2-Lite: a softmax router without normalisation, whose groups are chosen by their best expert.

Source: transformers 5.19 `modeling_deepseek_v2.py`; megatron-core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore.bridge.families import deepseek
from mcore.bridge.features import Features
from mcore.bridge.rules import Family

ONLY: Mapping[str, tuple[Any, ...]] = {
    "scoring_func": ("softmax",),
    "topk_method": ("greedy", "group_limited_greedy"),
    "norm_topk_prob": (False,),  # transformers never normalises
}


def transformer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of megatron's `MLATransformerConfig`.

    Raises:
        ConfigError: What can't be built; lists every key.
    """
    arguments = deepseek.latent_transformer_config(config, ONLY)
    if not has_groups(config):
        arguments |= {"moe_router_num_groups": None, "moe_router_group_topk": None}
    return {**arguments, "moe_router_score_function": "softmax", "moe_router_pre_softmax": True}


def has_groups(config: Mapping[str, Any]) -> bool:
    """Whether a token's experts come from some groups of experts only; `n_group` alone does not say so."""
    return config.get("topk_method") == "group_limited_greedy" and (config.get("n_group") or 1) > 1


FAMILY = Family(
    name="deepseek_v2",
    hf_architecture="DeepseekV2ForCausalLM",
    rules=deepseek.RULES,
    transformer_config=transformer_config,
    sizes=lambda config: deepseek.sizes(config, router_bias=False),
    features=lambda config: Features(expert_groups_by=1 if has_groups(config) else None),
)
