"""What a run may ask to be recomputed of its model. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from configs.schema.train import TrainConfig
from mcore.bridge.families import dims_of, family_of_config
from mcore.errors import Problem


def recompute_problems(config: TrainConfig, hf_config: Mapping[str, Any]) -> list[Problem]:
    """Modules to recompute that the model does not have, which megatron-core would pass over or refuse too late.

    Raises:
        ConfigError: The model is not known, or its sizes can't be read.
    """
    arguments = family_of_config(hf_config).transformer_config(hf_config)
    moe_layers = dims_of(hf_config).moe_layers
    has = {
        "mlp": not moe_layers or not all(moe_layers),
        "moe": any(moe_layers),
        "shared_experts": bool(arguments.get("moe_shared_expert_intermediate_size")),
        "mla_up_proj": bool(arguments.get("multi_latent_attention")),
    }
    return [
        Problem("train.recompute_modules", "modules that the model has", name, "Leave it out.")
        for name in config.recompute_modules
        if not has.get(name, True)
    ]
