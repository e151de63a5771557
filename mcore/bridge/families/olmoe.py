"""OLMoE: every layer has experts; query and key are normalised over their whole projection.

Source: transformers 5.19 `modeling_olmoe.py`, `conversion_mapping.py` (names in files); megatron-core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore.bridge.families.dense import dense_transformer_config
from mcore.bridge.families.moe import expert_arguments, expert_sizes
from mcore.bridge.families.windows import no_windows
from mcore.bridge.features import Features
from mcore.bridge.rules import Copy, Family, GateUp, Qkv, VocabRows
from mcore.errors import Problem
from mcore.findings import refuse, together

M, MA, MM = "decoder.layers.{L}.", "decoder.layers.{L}.self_attention.", "decoder.layers.{L}.mlp."
MX = "decoder.layers.{L}.mlp.experts.experts."
H, HA, HM = "model.layers.{L}.", "model.layers.{L}.self_attn.", "model.layers.{L}.mlp."
HX = "model.layers.{L}.mlp.experts.{E}."


def transformer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of megatron's `TransformerConfig`.

    Raises:
        ConfigError: Query, key and value are clipped, which neither megatron nor our layers do, or there is a window,
            which transformers heeds in some kinds of attention and not in others.
    """
    problems = [
        Problem(f"config.json: {key}", "null or nothing", repr(config[key]))
        for key in ("clip_qkv", "sliding_window")
        if config.get(key) is not None
    ]
    is_normalised = bool(config.get("norm_topk_prob", False))
    return together(
        lambda: refuse(problems),
        lambda: dense_transformer_config(config, add_qkv_bias=bool(config.get("attention_bias"))),
        lambda: expert_arguments(config, sizes(config), is_normalised=is_normalised),
    )


def sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes that the table names."""
    return expert_sizes(config, experts=("num_experts", "num_local_experts"), moe_ffn="intermediate_size")


def features(config: Mapping[str, Any]) -> Features:
    """What `TransformerConfig` has no field for: norms over the projection, and a bias on o but none on the MLP."""
    return Features(
        windows=no_windows(config),
        qk_norm_over="projection",
        attention_output_bias=True if config.get("attention_bias") else None,
    )


# fmt: off
RULES = (
    #              megatron parameter                  shape                  Hugging Face tensors
    VocabRows(     "embedding.word_embeddings.weight", "padded_vocab hidden", "model.embed_tokens.weight"),
    Copy     (MA + "linear_qkv.layer_norm_weight",     "hidden",              H + "input_layernorm.weight"),
    Qkv      (MA + "linear_qkv.weight",                "qkv_rows hidden",     HA + "{q,k,v}_proj.weight"),
    Qkv      (MA + "linear_qkv.bias",                  "qkv_rows",            HA + "{q,k,v}_proj.bias", "attention_bias"),  # noqa: E501
    Copy     (MA + "q_layernorm.weight",               "q_rows",              HA + "q_norm.weight"),
    Copy     (MA + "k_layernorm.weight",               "kv_rows",             HA + "k_norm.weight"),
    Copy     (MA + "linear_proj.weight",               "hidden q_rows",       HA + "o_proj.weight"),
    Copy     (MA + "linear_proj.bias",                 "hidden",              HA + "o_proj.bias", "attention_bias"),
    Copy     (M  + "pre_mlp_layernorm.weight",         "hidden",              H + "post_attention_layernorm.weight", "moe"),  # noqa: E501
    Copy     (MM + "router.weight",                    "experts hidden",      HM + "gate.weight", "moe"),
    GateUp   (MX + "linear_fc1.weight",                "2*moe_ffn hidden",    HX + "{gate,up}_proj.weight", "moe"),
    Copy     (MX + "linear_fc2.weight",                "hidden moe_ffn",      HX + "down_proj.weight", "moe"),
    Copy     (     "decoder.final_layernorm.weight",   "hidden",              "model.norm.weight"),
    VocabRows(     "output_layer.weight",              "padded_vocab hidden", "lm_head.weight", "untied"),
)
# fmt: on

FAMILY = Family(
    name="olmoe",
    hf_architecture="OlmoeForCausalLM",
    hf_model_type="olmoe",
    rules=RULES,
    transformer_config=transformer_config,
    sizes=sizes,
    features=features,
)
