"""The architectures that can be converted. Importing this, or a family, does not import torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

from mcore.bridge.dims import ModelDims
from mcore.bridge.families import classifier
from mcore.bridge.families.classifier import classifier_of
from mcore.bridge.rules import Family
from mcore.errors import ConfigError, Problem

SUPPORTED: Mapping[str, str] = MappingProxyType(
    {
        "DeepseekV2ForCausalLM": "deepseek_v2",
        "DeepseekV3ForCausalLM": "deepseek_v3",
        "Gemma2ForCausalLM": "gemma2",
        "Gemma2ForSequenceClassification": "gemma2",
        "Gemma3ForCausalLM": "gemma3",
        "Gemma3TextForSequenceClassification": "gemma3",
        "Glm4ForCausalLM": "glm4",
        "Glm4ForSequenceClassification": "glm4",
        "Glm4MoeForCausalLM": "glm4_moe",
        "GptOssForCausalLM": "gpt_oss",
        "LlamaForCausalLM": "llama",
        "LlamaForSequenceClassification": "llama",
        "Ministral3ForCausalLM": "ministral3",
        "Ministral3ForSequenceClassification": "ministral3",
        "MinistralForCausalLM": "ministral",
        "MinistralForSequenceClassification": "ministral",
        "MistralForCausalLM": "mistral",
        "MistralForSequenceClassification": "mistral",
        "MixtralForCausalLM": "mixtral",
        "MixtralForSequenceClassification": "mixtral",
        "Olmo2ForCausalLM": "olmo2",
        "Olmo2ForSequenceClassification": "olmo2",
        "OlmoeForCausalLM": "olmoe",
        "Phi3ForCausalLM": "phi3",
        "Phi3ForSequenceClassification": "phi3",
        "Qwen2ForCausalLM": "qwen2",
        "Qwen2ForSequenceClassification": "qwen2",
        "Qwen2MoeForCausalLM": "qwen2_moe",
        "Qwen3ForCausalLM": "qwen3",
        "Qwen3ForSequenceClassification": "qwen3",
        "Qwen3MoeForCausalLM": "qwen3_moe",
        "Qwen3MoeForSequenceClassification": "qwen3_moe",
    }
)
"""Module name of the family by the class name in `config.json`'s `architectures`."""


def family_of(architecture: str, *, brings_code: bool = False) -> Family:
    """The family of a Hugging Face architecture.

    Args:
        architecture: Class name.
        brings_code: Whether the model's folder holds code of its own for it, which is never run.

    Raises:
        ConfigError: There is none. Names those that there are.
    """
    if architecture not in SUPPORTED:
        raise ConfigError(
            "the model's architecture is not supported",
            [
                Problem(
                    "config.json: architectures",
                    f"one of {', '.join(sorted(SUPPORTED))}",
                    repr(architecture),
                    "Choose a model of a supported architecture, or add a family (CONTRIBUTING.md)."
                    + (" The code that the folder brings (auto_map) is never run." if brings_code else ""),
                )
            ],
        )
    family: Family = import_module(f"{__name__}.{SUPPORTED[architecture]}").FAMILY
    return classifier_of(family, architecture) if architecture.endswith(classifier.SUFFIX) else family


def family_of_config(config: Mapping[str, Any]) -> Family:
    """The family of the model that a Hugging Face `config.json` describes.

    Raises:
        ConfigError: It names no architecture, more than one, or one that is not supported.
    """
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise ConfigError(
            "the model's architecture can't be told",
            [Problem("config.json: architectures", "a list with one class name", repr(architectures))],
        )
    return family_of(str(architectures[0]), brings_code=bool(config.get("auto_map")))


def dims_of(config: Mapping[str, Any], *, make_vocab_size_divisible_by: int = 1) -> ModelDims:
    """Sizes of the model that a `config.json` describes, those of its family included.

    Args:
        config: The file's mapping.
        make_vocab_size_divisible_by: Rows: the vocabulary is padded up to a multiple of this.

    Raises:
        ConfigError: The architecture is not supported, or sizes are missing or do not fit each other.
    """
    family = family_of_config(config)
    dims = ModelDims.from_hf_config(config, make_vocab_size_divisible_by=make_vocab_size_divisible_by)
    own = family.sizes(config)
    fields = {field.name for field in dataclasses.fields(ModelDims)}
    return dataclasses.replace(
        dims,
        **{name: value for name, value in own.items() if name in fields},
        more=MappingProxyType({name: int(value) for name, value in own.items() if name not in fields}),
    )
