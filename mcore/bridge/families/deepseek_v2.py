"""DeepSeek-V2 and V2-Lite: a softmax router without normalisation, whose groups are chosen by their best expert.

Source: transformers 5.19 `modeling_deepseek_v2.py`; megatron-core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore.bridge.families import deepseek
from mcore.bridge.families.windows import no_windows
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
    arguments = deepseek.latent_transformer_config(config, ONLY, has_groups=has_groups(config))
    return {**arguments, "moe_router_score_function": "softmax", "moe_router_pre_softmax": True}


def has_groups(config: Mapping[str, Any]) -> bool:
    """Whether a token's experts come from some groups of experts only; `n_group` alone does not say so."""
    return config.get("topk_method") == "group_limited_greedy"


def features(config: Mapping[str, Any]) -> Features:
    """How the router's choice differs from megatron's, and that there are no windows.

    Raises:
        ConfigError: `layer_types` asks for windows.
    """
    by_best = 1 if has_groups(config) and config["n_group"] > 1 else None
    return Features(windows=no_windows(config), expert_groups_by=by_best)


FAMILY = Family(
    name="deepseek_v2",
    hf_architecture="DeepseekV2ForCausalLM",
    hf_model_type="deepseek_v2",
    needed=("q_lora_rank",),
    rules=deepseek.RULES,
    transformer_config=transformer_config,
    sizes=lambda config: deepseek.sizes(config, router_bias=False),
    features=features,
)
