"""OLMo 2, dense: norms behind attention and MLP and none in front, query and key normalised over all heads.

Source: transformers 5.19 `modeling_olmo2.py`; megatron-core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore.bridge.families.dense import dense_transformer_config
from mcore.bridge.families.windows import no_windows
from mcore.bridge.features import Features
from mcore.bridge.rules import Copy, Family, GateUp, Qkv, VocabRows

MA, MM = "decoder.layers.{L}.self_attention.", "decoder.layers.{L}.mlp."
H, HA, HM = "model.layers.{L}.", "model.layers.{L}.self_attn.", "model.layers.{L}.mlp."


def transformer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of megatron's `TransformerConfig`."""
    return dense_transformer_config(config, add_qkv_bias=bool(config.get("attention_bias")))


def features(config: Mapping[str, Any]) -> Features:
    """What `TransformerConfig` has no field for: where norms stand, what they go over, how they round; o's bias."""
    return Features(
        windows=no_windows(config),
        norm_placement="behind",
        norms_scale_in_fp32=True,
        qk_norm_over="projection",
        attention_output_bias=bool(config.get("attention_bias")),
    )


# fmt: off
RULES = (
    #              megatron parameter                   shape                  Hugging Face tensors
    VocabRows(     "embedding.word_embeddings.weight",  "padded_vocab hidden", "model.embed_tokens.weight"),
    Qkv      (MA + "linear_qkv.weight",                 "qkv_rows hidden",     HA + "{q,k,v}_proj.weight"),
    Qkv      (MA + "linear_qkv.bias",                   "qkv_rows",            HA + "{q,k,v}_proj.bias", "attention_bias"),  # noqa: E501
    Copy     (MA + "q_layernorm.weight",                "q_rows",              HA + "q_norm.weight"),
    Copy     (MA + "k_layernorm.weight",                "kv_rows",             HA + "k_norm.weight"),
    Copy     (MA + "linear_proj.weight",                "hidden q_rows",       HA + "o_proj.weight"),
    Copy     (MA + "linear_proj.bias",                  "hidden",              HA + "o_proj.bias", "attention_bias"),
    Copy     (MA + "linear_proj.post_layernorm.weight", "hidden",              H + "post_attention_layernorm.weight"),
    GateUp   (MM + "linear_fc1.weight",                 "gate_up_rows hidden", HM + "{gate,up}_proj.weight"),
    Copy     (MM + "linear_fc2.weight",                 "hidden ffn",          HM + "down_proj.weight"),
    Copy     (MM + "linear_fc2.post_layernorm.weight",  "hidden",              H + "post_feedforward_layernorm.weight"),
    Copy     (     "decoder.final_layernorm.weight",    "hidden",              "model.norm.weight"),
    VocabRows(     "output_layer.weight",               "padded_vocab hidden", "lm_head.weight", "untied"),
)
# fmt: on

FAMILY = Family(
    name="olmo2",
    hf_architecture="Olmo2ForCausalLM",
    hf_model_type="olmo2",
    rules=RULES,
    transformer_config=transformer_config,
    features=features,
)
