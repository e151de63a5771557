"""Ministral 8B: Mistral's tensors, with windows in some layers and none in others.

Source: transformers 5.19 `modeling_ministral.py`; megatron-core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore.bridge.families.mistral import RULES, transformer_config
from mcore.bridge.families.windows import FULL, SLIDING, windows_by_layer_type
from mcore.bridge.features import Features
from mcore.bridge.rules import Family


def features(config: Mapping[str, Any]) -> Features:
    """What `TransformerConfig` has no field for: windows, in every layer if the config names no `layer_types`."""
    window = config.get("sliding_window", 4096)
    default = [FULL if window is None else SLIDING] * config["num_hidden_layers"]
    return Features(windows=windows_by_layer_type(config, window=window, default=default))


FAMILY = Family(
    name="ministral",
    hf_architecture="MinistralForCausalLM",
    hf_model_type="ministral",
    needed=("num_key_value_heads",),
    rules=RULES,
    transformer_config=transformer_config,
    features=features,
)
