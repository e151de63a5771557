"""Qwen3 with experts: query and key normalised per head, no shared expert, some layers may be dense.

Source: transformers 5.19 `modeling_qwen3_moe.py`, `conversion_mapping.py` (names in files); megatron-core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore.bridge.families.dense import dense_transformer_config
from mcore.bridge.families.moe import expert_arguments, expert_sizes, qwen_moe_layers
from mcore.bridge.families.windows import no_windows, windows_of_all
from mcore.bridge.features import Features
from mcore.bridge.rules import Copy, Family, GateUp, Qkv, VocabRows
from mcore.findings import together

M, MA, MM = "decoder.layers.{L}.", "decoder.layers.{L}.self_attention.", "decoder.layers.{L}.mlp."
MX = "decoder.layers.{L}.mlp.experts.experts."
H, HA, HM = "model.layers.{L}.", "model.layers.{L}.self_attn.", "model.layers.{L}.mlp."
HX = "model.layers.{L}.mlp.experts.{E}."


def transformer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of megatron's `TransformerConfig`."""
    is_normalised = bool(config.get("norm_topk_prob", False))
    has_bias = bool(config.get("attention_bias"))
    return together(
        lambda: dense_transformer_config(config, add_qkv_bias=has_bias, qk_layernorm=True),
        lambda: expert_arguments(config, sizes(config), is_normalised=is_normalised),
    )


def sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes that the table names. transformers has renamed the number of experts."""
    return together(
        lambda: expert_sizes(config, experts=("num_experts", "num_local_experts"), moe_ffn="moe_intermediate_size"),
        lambda: {"moe_layers": qwen_moe_layers(config)},
    )


def features(config: Mapping[str, Any]) -> Features:
    """What `TransformerConfig` has no field for: a window for all layers, and a bias on o but none on the MLP."""
    return Features(
        windows=(windows_of_all(config, default=4096) if config.get("use_sliding_window") else no_windows(config)),
        attention_output_bias=True if config.get("attention_bias") else None,
    )


# fmt: off
RULES = (
    #              megatron parameter                  shape                  Hugging Face tensors
    VocabRows(     "embedding.word_embeddings.weight", "padded_vocab hidden", "model.embed_tokens.weight"),
    Copy     (MA + "linear_qkv.layer_norm_weight",     "hidden",              H + "input_layernorm.weight"),
    Qkv      (MA + "linear_qkv.weight",                "qkv_rows hidden",     HA + "{q,k,v}_proj.weight"),
    Qkv      (MA + "linear_qkv.bias",                  "qkv_rows",            HA + "{q,k,v}_proj.bias", "attention_bias"),  # noqa: E501
    Copy     (MA + "q_layernorm.weight",               "head_dim",            HA + "q_norm.weight"),
    Copy     (MA + "k_layernorm.weight",               "head_dim",            HA + "k_norm.weight"),
    Copy     (MA + "linear_proj.weight",               "hidden q_rows",       HA + "o_proj.weight"),
    Copy     (MA + "linear_proj.bias",                 "hidden",              HA + "o_proj.bias", "attention_bias"),
    Copy     (MM + "linear_fc1.layer_norm_weight",     "hidden",              H + "post_attention_layernorm.weight", "dense"),  # noqa: E501
    GateUp   (MM + "linear_fc1.weight",                "gate_up_rows hidden", HM + "{gate,up}_proj.weight", "dense"),
    Copy     (MM + "linear_fc2.weight",                "hidden ffn",          HM + "down_proj.weight", "dense"),
    Copy     (M  + "pre_mlp_layernorm.weight",         "hidden",              H + "post_attention_layernorm.weight", "moe"),  # noqa: E501
    Copy     (MM + "router.weight",                    "experts hidden",      HM + "gate.weight", "moe"),
    GateUp   (MX + "linear_fc1.weight",                "2*moe_ffn hidden",    HX + "{gate,up}_proj.weight", "moe"),
    Copy     (MX + "linear_fc2.weight",                "hidden moe_ffn",      HX + "down_proj.weight", "moe"),
    Copy     (     "decoder.final_layernorm.weight",   "hidden",              "model.norm.weight"),
    VocabRows(     "output_layer.weight",              "padded_vocab hidden", "lm_head.weight", "untied"),
)
# fmt: on

FAMILY = Family(
    name="qwen3_moe",
    hf_architecture="Qwen3MoeForCausalLM",
    hf_model_type="qwen3_moe",
    needed=("num_key_value_heads",),
    rules=RULES,
    transformer_config=transformer_config,
    sizes=sizes,
    features=features,
)
