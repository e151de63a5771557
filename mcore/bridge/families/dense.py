"""What the `config.json` of every dense decoder with RMSNorm, RoPE and a gated MLP means to megatron."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore.bridge.dims import ModelDims
from mcore.errors import Problem
from mcore.findings import Findings, refuse


def dense_transformer_config(
    config: Mapping[str, Any],
    *,
    add_qkv_bias: bool = False,
    add_bias_linear: bool = False,
    qk_layernorm: bool = False,
    has_partial_rotary: bool = False,
    activation: tuple[str, str, str] = ("hidden_act", "silu", "silu"),
) -> dict[str, Any]:
    """Keyword arguments of megatron's `TransformerConfig`; everything left out keeps megatron's default.

    Args:
        config: Mapping of a Hugging Face `config.json`.
        add_qkv_bias: Whether q, k and v have a bias.
        add_bias_linear: Whether every linear layer has one.
        qk_layernorm: Whether each head's query and key are normalised.
        has_partial_rotary: Whether the family reads `partial_rotary_factor`, whatever the rope type is.
        activation: Key of the config that names the MLP's activation, the name it must have, and megatron's name.

    Raises:
        ConfigError: The config asks for something that would be silently left out. Lists every such key.
    """
    findings = Findings()
    dims = findings.of(lambda: ModelDims.from_hf_config(config))
    problems = _beyond_dense(config, has_partial_rotary=has_partial_rotary)
    key, hf_name, mcore_name = activation
    if (found := config.get(key, hf_name)) != hf_name:
        problems.append(Problem(f"config.json: {key}", repr(hf_name), repr(found)))
    epsilon = config.get("rms_norm_eps")
    if not isinstance(epsilon, float) or epsilon <= 0:
        problems.append(Problem("config.json: rms_norm_eps", "a positive number", repr(epsilon)))
    findings.of(lambda: refuse(problems, "the model has features that the conversion does not know"))
    if dims is None or findings.errors:
        findings.raise_all()
    return {
        "num_layers": dims.num_layers,
        "hidden_size": dims.hidden,
        "ffn_hidden_size": dims.ffn,
        "num_attention_heads": dims.heads,
        "num_query_groups": dims.groups,
        "kv_channels": dims.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": epsilon,
        "qk_layernorm": qk_layernorm,
        "add_bias_linear": add_bias_linear,
        "add_qkv_bias": add_qkv_bias,
        "gated_linear_unit": True,
        "activation_func": mcore_name,
        # megatron's defaults are 0.1; no dense family trains or runs with dropout.
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _beyond_dense(config: Mapping[str, Any], *, has_partial_rotary: bool) -> list[Problem]:
    problems = []
    if not has_partial_rotary:
        # transformers leaves the factor out of plain rotary embeddings of these families, but heeds it in scaled ones;
        # vLLM heeds it in all.
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        for place, mapping in (("", config), ("rope_parameters.", rope)):
            factor = mapping.get("partial_rotary_factor")
            if factor not in (None, 1, 1.0):
                problems.append(Problem(f"config.json: {place}partial_rotary_factor", "1", repr(factor)))
    return problems
