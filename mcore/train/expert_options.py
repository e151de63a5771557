"""What a run may ask for the experts of its model. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from configs.schema.experts import ExpertFields
from mcore.bridge.families import dims_of, family_of_config
from mcore.errors import Problem

BIAS_RATE = "moe_router_bias_update_rate"


def balancing_problems(fields: ExpertFields, hf_config: Mapping[str, Any]) -> list[Problem]:
    """Everything that a run asks for experts which its model does not have.

    Raises:
        ConfigError: The model is not known, or its sizes can't be read.
    """
    described = ExpertFields.model_fields
    asked = {name: value for name in described if (value := getattr(fields, name)) != described[name].default}
    if not any(dims_of(hf_config).moe_layers):
        text = "to be left out, as the model has no experts"
        return [Problem(f"train.{name}", text, str(value)) for name, value in asked.items()]
    if BIAS_RATE in asked and not family_of_config(hf_config).transformer_config(hf_config).get(
        "moe_router_enable_expert_bias"
    ):
        text = "0, as the model's routers have no bias that balances experts"
        return [Problem(f"train.{BIAS_RATE}", text, str(asked[BIAS_RATE]))]
    return []


def expert_arguments(fields: ExpertFields) -> dict[str, Any]:
    """Arguments of megatron-core's `TransformerConfig` for a model with experts."""
    return {name: getattr(fields, name) for name in ExpertFields.model_fields}
