"""Mixtral: every layer has experts, and a token's shares of its experts sum up to 1.

Source: transformers 5.19 `modeling_mixtral.py`, `conversion_mapping.py` (names in files); megatron-core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore.bridge.families.dense import dense_transformer_config
from mcore.bridge.families.moe import expert_arguments, expert_sizes
from mcore.bridge.families.windows import windows_of_all
from mcore.bridge.features import Features
from mcore.bridge.rules import Copy, Family, GateUp, Qkv, VocabRows
from mcore.findings import together

M, MA, MM = "decoder.layers.{L}.", "decoder.layers.{L}.self_attention.", "decoder.layers.{L}.mlp."
MX = "decoder.layers.{L}.mlp.experts.experts."
H, HA, HM = "model.layers.{L}.", "model.layers.{L}.self_attn.", "model.layers.{L}.block_sparse_moe."
HX = "model.layers.{L}.block_sparse_moe.experts.{E}."


def transformer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of megatron's `TransformerConfig`."""
    return together(
        lambda: dense_transformer_config(config),
        lambda: expert_arguments(config, sizes(config), is_normalised=True),
    )


def sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes that the table names."""
    return expert_sizes(config, experts=("num_local_experts", "num_experts"), moe_ffn="intermediate_size")


def features(config: Mapping[str, Any]) -> Features:
    """What `TransformerConfig` has no field for: windows."""
    return Features(windows=windows_of_all(config, default=None))


# fmt: off
RULES = (
    #              megatron parameter                  shape                  Hugging Face tensors
    VocabRows(     "embedding.word_embeddings.weight", "padded_vocab hidden", "model.embed_tokens.weight"),
    Copy     (MA + "linear_qkv.layer_norm_weight",     "hidden",              H + "input_layernorm.weight"),
    Qkv      (MA + "linear_qkv.weight",                "qkv_rows hidden",     HA + "{q,k,v}_proj.weight"),
    Copy     (MA + "linear_proj.weight",               "hidden q_rows",       HA + "o_proj.weight"),
    Copy     (M  + "pre_mlp_layernorm.weight",         "hidden",              H + "post_attention_layernorm.weight", "moe"),  # noqa: E501
    Copy     (MM + "router.weight",                    "experts hidden",      HM + "gate.weight", "moe"),
    GateUp   (MX + "linear_fc1.weight",                "2*moe_ffn hidden",    HX + "{w1,w3}.weight", "moe"),
    Copy     (MX + "linear_fc2.weight",                "hidden moe_ffn",      HX + "w2.weight", "moe"),
    Copy     (     "decoder.final_layernorm.weight",   "hidden",              "model.norm.weight"),
    VocabRows(     "output_layer.weight",              "padded_vocab hidden", "lm_head.weight", "untied"),
)
# fmt: on

FAMILY = Family(
    name="mixtral",
    hf_architecture="MixtralForCausalLM",
    hf_model_type="mixtral",
    needed=("num_key_value_heads",),
    rules=RULES,
    transformer_config=transformer_config,
    sizes=sizes,
    features=features,
)
