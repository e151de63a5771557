"""GLM-4.5 and GLM-4.6: grouped queries, half of each head turned, experts and further-token layers as DeepSeek-V3.

Source: transformers 5.19 `modeling_glm4_moe.py` (the output projection never has a bias); megatron-core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore.bridge.families import deepseek_moe
from mcore.bridge.families.dense import dense_transformer_config
from mcore.bridge.rules import Copy, Family, Qkv, VocabRows, mtp_rules
from mcore.errors import ConfigError
from mcore.findings import together

MA = "decoder.layers.{L}.self_attention."
H, HA = "model.layers.{L}.", "model.layers.{L}.self_attn."

# fmt: off
ATTENTION_RULES = (
    #         megatron parameter               shape                  Hugging Face tensors
    Copy(MA + "linear_qkv.layer_norm_weight",  "hidden",              H  + "input_layernorm.weight"),
    Qkv (MA + "linear_qkv.weight",             "qkv_rows hidden",     HA + "{q,k,v}_proj.weight"),
    Qkv (MA + "linear_qkv.bias",               "qkv_rows",            HA + "{q,k,v}_proj.bias", "attention_bias"),
    Copy(MA + "q_layernorm.weight",            "head_dim",            HA + "q_norm.weight", "qk_norm"),
    Copy(MA + "k_layernorm.weight",            "head_dim",            HA + "k_norm.weight", "qk_norm"),
    Copy(MA + "linear_proj.weight",            "hidden q_rows",       HA + "o_proj.weight"),
)
LAYER_RULES = (*ATTENTION_RULES, *deepseek_moe.MLP_RULES)
RULES = (
    VocabRows("embedding.word_embeddings.weight", "padded_vocab hidden", "model.embed_tokens.weight"),
    *LAYER_RULES,
    *mtp_rules(LAYER_RULES),
    *deepseek_moe.MTP_RULES,
    Copy(     "decoder.final_layernorm.weight",   "hidden",              "model.norm.weight"),
    VocabRows("output_layer.weight",              "padded_vocab hidden", "lm_head.weight", "untied"),
)
# fmt: on


def sizes(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Sizes and switches that the table names.

    Raises:
        ConfigError: Keys are missing or no positive integers; lists all of them.
    """
    if problems := deepseek_moe.missing_counts(config, deepseek_moe.COUNTS) + deepseek_moe.other_names(config):
        raise ConfigError("the model's sizes can't be read", problems)
    return {
        **deepseek_moe.moe_sizes(config, router_bias=True),
        "qk_norm": bool(config.get("use_qk_norm")),
    }


def transformer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of megatron's `TransformerConfig`.

    Raises:
        ConfigError: What can't be built.
    """
    return together(
        lambda: dense_transformer_config(
            config,
            add_qkv_bias=bool(config.get("attention_bias")),
            qk_layernorm=bool(config.get("use_qk_norm")),
            has_partial_rotary=True,
        ),
        lambda: deepseek_moe.moe_arguments(config),
        lambda: deepseek_moe.sigmoid_router(config),
    )


FAMILY = Family(
    name="glm4_moe",
    hf_architecture="Glm4MoeForCausalLM",
    hf_model_type="glm4_moe",
    needed=("num_key_value_heads", "first_k_dense_replace"),
    rules=RULES,
    tied_hf=deepseek_moe.TIED,
    transformer_config=transformer_config,
    sizes=sizes,
    features=deepseek_moe.sigmoid_features,
)
