"""Gemma 3, text: as Gemma 2, but query and key are normalised instead of scores capped, and sliding layers have a rope
of their own.

Models that see images nest this one in `text_config` and have another architecture.

Source: transformers 5.19 `modeling_gemma3.py` and `configuration_gemma3.py`; megatron-core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore.bridge.families import gemma2
from mcore.bridge.families.gemma2 import HA, MA, gemma_problems, gemma_transformer_config, sizes
from mcore.bridge.families.windows import FULL, SLIDING, windows_by_layer_type
from mcore.bridge.features import Features
from mcore.bridge.rules import Copy, Family
from mcore.errors import ConfigError, Problem


def transformer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of megatron's `TransformerConfig`.

    Raises:
        ConfigError: As of Gemma 2; or scores are to be capped, which transformers' class does not do and vLLM's does.
    """
    problems = gemma_problems(config)
    if (cap := config.get("attn_logit_softcapping")) is not None:
        problems.append(Problem("config.json: attn_logit_softcapping", "null", repr(cap)))
    return gemma_transformer_config(config, problems) | {"qk_layernorm": True}


def features(config: Mapping[str, Any]) -> Features:
    """What `TransformerConfig` has no field for. Without `layer_types`, one layer in six sees everything.

    Raises:
        ConfigError: As `windows_by_layer_type`.
    """
    pattern, types = config.get("sliding_window_pattern", 6), config.get("layer_types")
    if not types and (not isinstance(pattern, int) or pattern < 1):
        problem = Problem("config.json: sliding_window_pattern", "a positive number of layers", repr(pattern))
        raise ConfigError("the model's attention windows can't be told", [problem])
    types = types or [SLIDING if (layer + 1) % pattern else FULL for layer in range(config["num_hidden_layers"])]
    return Features(
        windows=windows_by_layer_type(config, window=config.get("sliding_window", 4096), default=types),
        logit_softcap=config.get("final_logit_softcapping"),
        norm_placement="around",
        embedding_scale=config["hidden_size"] ** 0.5,
        rope_of_layer=tuple(types),
    )


# fmt: off
RULES = (
    *gemma2.RULES,
    #         megatron parameter        shape       Hugging Face tensors
    Copy(MA + "q_layernorm.weight",     "head_dim", HA + "q_norm.weight"),
    Copy(MA + "k_layernorm.weight",     "head_dim", HA + "k_norm.weight"),
)
# fmt: on

FAMILY = Family(
    name="gemma3",
    hf_architecture="Gemma3ForCausalLM",
    hf_model_type="gemma3_text",
    needed=("num_key_value_heads",),
    rules=RULES,
    transformer_config=transformer_config,
    sizes=sizes,
    features=features,
)
