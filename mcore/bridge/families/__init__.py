"""The architectures that can be converted. Importing this, or a family, does not import torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

from mcore.backend.rope_scaling import rope_parameters
from mcore.bridge.dims import ModelDims
from mcore.bridge.families import classifier
from mcore.bridge.families.classifier import classifier_of
from mcore.bridge.rules import Family
from mcore.errors import ConfigError, Problem
from mcore.findings import Findings, refuse

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

NO_EFFECT = ("attention_dropout", "embd_pdrop", "resid_pdrop", "router_jitter_noise")
"""Keys that transformers heeds in training only, and that are left out of ours."""


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
        ConfigError: It names no architecture, more than one, or one that is not supported; or it has what no family can
            be built with. Names all of that.
    """
    family = _named_family(config)
    refuse(_never_built(config, family))
    return family


def config_findings(config: Mapping[str, Any], *, make_vocab_size_divisible_by: int = 1) -> Findings:
    """Everything that a `config.json` itself keeps from being converted: every check runs, whatever the others find.

    Args:
        config: The file's mapping.
        make_vocab_size_divisible_by: As of `dims_of`.
    """
    findings = Findings()
    family = findings.of(lambda: _named_family(config))
    if family is None:
        return findings  # what the keys of an unknown architecture mean is not known either
    findings.of(lambda: refuse(_never_built(config, family)))
    findings.of(lambda: ModelDims.from_hf_config(config, make_vocab_size_divisible_by=make_vocab_size_divisible_by))
    findings.of(lambda: refuse(_missing(config, family), "the model's sizes can't be read"))
    if config.get("model_type") is None:  # transformers and vLLM can't open a folder without it
        problem = Problem("config.json: model_type", repr(family.hf_model_type), "nothing")
        findings.of(lambda: refuse([problem], "the model's architecture can't be told"))
    for check in (family.sizes, family.transformer_config, family.features, rope_parameters):
        findings.of_config(lambda check=check: check(config))  # type: ignore[misc]
    return findings


def without_effect(config: Mapping[str, Any]) -> list[str]:
    """Settings of training that a `config.json` has and that are left out: ours has no dropout and no noise."""
    return [f"{key} {config[key]}" for key in NO_EFFECT if config.get(key)]


def _named_family(config: Mapping[str, Any]) -> Family:
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise ConfigError(
            "the model's architecture can't be told",
            [Problem("config.json: architectures", "a list with one class name", repr(architectures))],
        )
    return family_of(str(architectures[0]), brings_code=bool(config.get("auto_map")))


def _never_built(config: Mapping[str, Any], family: Family) -> list[Problem]:
    """What transformers heeds in every family, and ours in none.

    Source: transformers 5.19 `masking_utils.py` (`is_causal`), `configuration_utils.py` (`per_layer_config`).
    """
    problems = []
    if (kind := config.get("model_type")) not in (None, family.hf_model_type):
        text = f"{family.hf_model_type!r}, as architectures has {family.hf_architecture}"
        problems.append(Problem("config.json: model_type", text, repr(kind), "transformers builds by model_type."))
    if config.get("is_causal", True) is not True:
        text = "true or no such key, as attention to later tokens can't be built"
        problems.append(Problem("config.json: is_causal", text, repr(config["is_causal"])))
    if config.get("per_layer_config"):
        text = "nothing, as layers with settings of their own can't be built"
        problems.append(Problem("config.json: per_layer_config", text, repr(config["per_layer_config"])[:200]))
    return problems


def _missing(config: Mapping[str, Any], family: Family) -> list[Problem]:
    return [
        Problem(f"config.json: {key}", "a value", "nothing", "transformers would take that of a certain model.")
        for key in family.needed
        if key not in config
    ]


def dims_of(config: Mapping[str, Any], *, make_vocab_size_divisible_by: int = 1) -> ModelDims:
    """Sizes of the model that a `config.json` describes, those of its family included.

    Args:
        config: The file's mapping.
        make_vocab_size_divisible_by: Rows: the vocabulary is padded up to a multiple of this.

    Raises:
        ConfigError: The architecture is not supported, or sizes are missing or do not fit each other.
    """
    family = family_of_config(config)
    findings = Findings()
    dims = findings.of(
        lambda: ModelDims.from_hf_config(config, make_vocab_size_divisible_by=make_vocab_size_divisible_by)
    )
    findings.of(lambda: refuse(_missing(config, family), "the model's sizes can't be read"))
    own = findings.of_config(lambda: family.sizes(config))
    if dims is None or own is None or findings.errors:
        findings.raise_all()
    fields = {field.name for field in dataclasses.fields(ModelDims)}
    return dataclasses.replace(
        dims,
        **{name: value for name, value in own.items() if name in fields},
        more=MappingProxyType({name: int(value) for name, value in own.items() if name not in fields}),
    )
