"""gpt-oss: sinks, biases everywhere, a window in every other layer, and experts with a clamped gate.

Weights are read in the layout of 16-bit files, `[experts, in, out]` with a column of gate, a column of up, and so on.

Source: transformers 5.19 `modeling_gpt_oss.py`; megatron-core 0.16.1 `fused_bias_geglu.py` (quick GELU, its offset and
clamp).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore.bridge.families.dense import dense_transformer_config
from mcore.bridge.families.moe import expert_arguments, expert_sizes
from mcore.bridge.families.windows import FULL, SLIDING, windows_by_layer_type
from mcore.bridge.features import Features
from mcore.bridge.rules import Copy, Family, InterleavedGateUp, Qkv, VocabRows
from mcore.errors import Problem
from mcore.findings import refuse, together

M, MA, MM = "decoder.layers.{L}.", "decoder.layers.{L}.self_attention.", "decoder.layers.{L}.mlp."
MX = "decoder.layers.{L}.mlp.experts.experts."
H, HA, HM = "model.layers.{L}.", "model.layers.{L}.self_attn.", "model.layers.{L}.mlp."
HX = "model.layers.{L}.mlp.experts."

QUICK_GELU_ALPHA = 1.702
"""The gate is `x * sigmoid(alpha * x)`; megatron's quick GELU has this number in its code."""


def transformer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of megatron's `TransformerConfig`.

    Raises:
        ConfigError: Attention without biases, or a gate that is no quick GELU.
    """
    problems = []
    if not config.get("attention_bias", True):
        problems.append(Problem("config.json: attention_bias", "true, as experts and router have biases", "false"))
    if (alpha := config.get("swiglu_alpha", QUICK_GELU_ALPHA)) != QUICK_GELU_ALPHA:
        problems.append(Problem("config.json: swiglu_alpha", str(QUICK_GELU_ALPHA), repr(alpha)))
    limit = config.get("swiglu_limit", 7.0)
    if not isinstance(limit, int | float) or limit <= 0:
        problems.append(Problem("config.json: swiglu_limit", "a positive number", repr(limit)))
    return together(
        lambda: refuse(problems),
        lambda: dense_transformer_config(config, add_bias_linear=True),
        lambda: expert_arguments(config, sizes(config), is_normalised=True),
        # The up half is clamped, and 1 is added to it.
        lambda: {
            "activation_func": "quick_gelu",
            "activation_func_clamp_value": float(limit),
            "glu_linear_offset": 1.0,
        },
    )


def sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes that the table names, and that experts have biases."""
    experts = expert_sizes(config, experts=("num_local_experts", "num_experts"), moe_ffn="intermediate_size")
    return experts | {"expert_bias": 1}


def features(config: Mapping[str, Any]) -> Features:
    """What `TransformerConfig` has no field for: sinks, windows, and how norms round."""
    types = [SLIDING if layer % 2 == 0 else FULL for layer in range(config["num_hidden_layers"])]
    windows = windows_by_layer_type(config, window=config.get("sliding_window", 128), default=types)
    return Features(windows=windows, has_sinks=True, norms_scale_in_fp32=True)


# fmt: off
RULES = (
    #                      megatron parameter                  shape                  Hugging Face tensors
    VocabRows        (     "embedding.word_embeddings.weight", "padded_vocab hidden", "model.embed_tokens.weight"),
    Copy             (MA + "linear_qkv.layer_norm_weight",     "hidden",              H + "input_layernorm.weight"),
    Qkv              (MA + "linear_qkv.weight",                "qkv_rows hidden",     HA + "{q,k,v}_proj.weight"),
    Qkv              (MA + "linear_qkv.bias",                  "qkv_rows",            HA + "{q,k,v}_proj.bias"),
    Copy             (MA + "core_attention.softmax_offset",    "heads",               HA + "sinks"),
    Copy             (MA + "linear_proj.weight",               "hidden q_rows",       HA + "o_proj.weight"),
    Copy             (MA + "linear_proj.bias",                 "hidden",              HA + "o_proj.bias"),
    Copy             (M  + "pre_mlp_layernorm.weight",         "hidden",              H + "post_attention_layernorm.weight", "moe"),  # noqa: E501
    Copy             (MM + "router.weight",                    "experts hidden",      HM + "router.weight", "moe"),
    Copy             (MM + "router.bias",                      "experts",             HM + "router.bias", "moe"),
    InterleavedGateUp(MX + "linear_fc1.weight",                "2*moe_ffn hidden",    HX + "gate_up_proj[{E}].T", "moe"),  # noqa: E501
    InterleavedGateUp(MX + "linear_fc1.bias",                  "2*moe_ffn",           HX + "gate_up_proj_bias[{E}]", "moe"),  # noqa: E501
    Copy             (MX + "linear_fc2.weight",                "hidden moe_ffn",      HX + "down_proj[{E}].T", "moe"),
    Copy             (MX + "linear_fc2.bias",                  "hidden",              HX + "down_proj_bias[{E}]", "moe"),  # noqa: E501
    Copy             (     "decoder.final_layernorm.weight",   "hidden",              "model.norm.weight"),
    VocabRows        (     "output_layer.weight",              "padded_vocab hidden", "lm_head.weight", "untied"),
)
# fmt: on

FAMILY = Family(
    name="gpt_oss",
    hf_architecture="GptOssForCausalLM",
    hf_model_type="gpt_oss",
    needed=("num_key_value_heads", "head_dim"),
    rules=RULES,
    transformer_config=transformer_config,
    sizes=sizes,
    features=features,
)
