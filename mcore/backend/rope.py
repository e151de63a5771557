"""Rotary frequencies, computed by transformers' own code for the model's config.

megatron-core knows one scaling (Llama 3's, with three of its four numbers fixed in the code). Its rotary module needs
nothing but the inverse frequencies, so they are computed by the functions that the reference model uses and put in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mcore.backend.rope_scaling import rope_parameters
from mcore.errors import ConfigError, Problem


def inverse_frequencies(hf_config: Mapping[str, Any]) -> torch.Tensor:
    """Inverse frequencies of the rotary embedding, `[head_dim / 2]`, fp32.

    Raises:
        ConfigError: The scaling needs more than inverse frequencies.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kind = rope_parameters(hf_config)["rope_type"]
    default: Any = LlamaRotaryEmbedding.compute_default_rope_parameters
    try:
        config = AutoConfig.for_model(**hf_config)
        with torch.device("cpu"):  # whatever device a plan on the meta device has made the default
            frequencies, factor = (default if kind == "default" else ROPE_INIT_FUNCTIONS[kind])(config)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as exc:
        raise ConfigError(
            "the model's config is not valid", [Problem("config.json", f"what transformers takes: {exc}")]
        ) from exc
    if factor != 1.0:
        raise ConfigError(
            "the model's rotary embedding can't be built", [Problem(f"rope type {kind}", "factor 1", str(factor))]
        )
    return frequencies.float()
