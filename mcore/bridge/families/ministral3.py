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
from mcore.errors import Problem
from mcore.findings import refuse, together

BETA, LENGTH = "llama_4_scaling_beta", "original_max_position_embeddings"


def transformer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of megatron's `TransformerConfig`.

    Raises:
        ConfigError: `head_dim` is missing; transformers' default is 128, whatever the hidden size.
    """
    problems = []
    if config.get("head_dim") is None:
        problems.append(Problem("config.json: head_dim", "a number", "nothing", "Write it down; Ministral 3's is 128."))
    return together(
        lambda: refuse(problems, "the model's sizes can't be read"),
        lambda: mistral_config(config),
    )


def features(config: Mapping[str, Any]) -> Features:
    """What `TransformerConfig` has no field for: windows, and how queries grow.

    Raises:
        ConfigError: The rope settings lack what queries grow by, or another key contradicts them; or as
            `windows_of_all`.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    problems = [
        Problem(f"config.json: rope_parameters.{key}", "a number", repr(rope.get(key)))
        for key in (BETA, LENGTH)
        if not isinstance(rope.get(key), int | float)
        or isinstance(rope[key], bool)
        or (key == LENGTH and rope[key] <= 0)
    ]
    if LENGTH in config and config[LENGTH] != rope.get(LENGTH):
        text = f"{rope.get(LENGTH)!r}, as rope_parameters has"
        fix = "transformers takes this one, other engines that one."
        problems.append(Problem(f"config.json: {LENGTH}", text, repr(config[LENGTH]), fix))
    found = together(
        lambda: refuse(problems, "how queries grow with their position can't be told"),
        lambda: {"windows": windows_of_all(config, default=None)},
    )
    return Features(**found, query_scale=QueryScale(beta=float(rope[BETA]), length=rope[LENGTH]))


FAMILY = Family(
    name="ministral3",
    hf_architecture="Ministral3ForCausalLM",
    hf_model_type="ministral3",
    needed=("num_key_value_heads",),
    rules=RULES,
    transformer_config=transformer_config,
    features=features,
)
