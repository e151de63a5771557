"""Ministral 3, text: Mistral's tensors, YaRN, and queries that grow with their position.

Source: transformers 5.19 `modeling_ministral3.py` and `configuration_ministral3.py`; megatron-core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore.bridge.families.mistral import RULES
from mcore.bridge.families.mistral import transformer_config as mistral_config
from mcore.bridge.families.windows import windows_of_all
from mcore.bridge.features import Features, QueryScale
from mcore.bridge.rules import Family
from mcore.errors import ConfigError, Problem

BETA, LENGTH = "llama_4_scaling_beta", "original_max_position_embeddings"


def transformer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of megatron's `TransformerConfig`.

    Raises:
        ConfigError: `head_dim` is missing; transformers' default is 128, whatever the hidden size.
    """
    if config.get("head_dim") is None:
        raise ConfigError(
            "the model's sizes can't be read",
            [Problem("config.json: head_dim", "a number", "nothing", "Write it down; Ministral 3's is 128.")],
        )
    return mistral_config(config)


def features(config: Mapping[str, Any]) -> Features:
    """What `TransformerConfig` has no field for: windows, and how queries grow.

    Raises:
        ConfigError: The rope settings lack what queries grow by.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    problems = [
        Problem(f"config.json: rope_parameters.{key}", "a number", repr(rope.get(key)))
        for key in (BETA, LENGTH)
        if not isinstance(rope.get(key), int | float) or isinstance(rope[key], bool)
    ]
    if problems:
        raise ConfigError("how queries grow with their position can't be told", problems)
    return Features(
        windows=windows_of_all(config, default=None),
        query_scale=QueryScale(beta=float(rope[BETA]), length=rope[LENGTH]),
    )


FAMILY = Family(
    name="ministral3",
    hf_architecture="Ministral3ForCausalLM",
    rules=RULES,
    transformer_config=transformer_config,
    features=features,
)
