"""Mistral, dense, up to 7B v0.3, Nemo and Small: one window for all layers or none, `head_dim` of its own.

Source: transformers 5.19 `modeling_mistral.py`; megatron-core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore.bridge.families.dense import dense_transformer_config
from mcore.bridge.families.windows import windows_of_all
from mcore.bridge.features import Features
from mcore.bridge.rules import Copy, Family, GateUp, Qkv, VocabRows

MA, MM = "decoder.layers.{L}.self_attention.", "decoder.layers.{L}.mlp."
H, HA, HM = "model.layers.{L}.", "model.layers.{L}.self_attn.", "model.layers.{L}.mlp."


def transformer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of megatron's `TransformerConfig`."""
    return dense_transformer_config(config)


def features(config: Mapping[str, Any]) -> Features:
    """What `TransformerConfig` has no field for: windows. A config without `sliding_window` means 4096, as v0.1's."""
    return Features(windows=windows_of_all(config, default=4096))


# fmt: off
RULES = (
    #              megatron parameter                  shape                  Hugging Face tensors
    VocabRows(     "embedding.word_embeddings.weight", "padded_vocab hidden", "model.embed_tokens.weight"),
    Copy     (MA + "linear_qkv.layer_norm_weight",     "hidden",              H + "input_layernorm.weight"),
    Qkv      (MA + "linear_qkv.weight",                "qkv_rows hidden",     HA + "{q,k,v}_proj.weight"),
    Copy     (MA + "linear_proj.weight",               "hidden q_rows",       HA + "o_proj.weight"),
    Copy     (MM + "linear_fc1.layer_norm_weight",     "hidden",              H + "post_attention_layernorm.weight"),
    GateUp   (MM + "linear_fc1.weight",                "gate_up_rows hidden", HM + "{gate,up}_proj.weight"),
    Copy     (MM + "linear_fc2.weight",                "hidden ffn",          HM + "down_proj.weight"),
    Copy     (     "decoder.final_layernorm.weight",   "hidden",              "model.norm.weight"),
    VocabRows(     "output_layer.weight",              "padded_vocab hidden", "lm_head.weight", "untied"),
)
# fmt: on

FAMILY = Family(
    name="mistral",
    hf_architecture="MistralForCausalLM",
    hf_model_type="mistral",
    needed=("num_key_value_heads",),
    rules=RULES,
    transformer_config=transformer_config,
    features=features,
)
