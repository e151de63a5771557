"""Qwen2 and Qwen2.5, dense.

Source: transformers 5.19 `modeling_qwen2.py` (q, k and v always have a bias, o never); megatron-core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore.bridge.families.dense import dense_transformer_config
from mcore.bridge.families.windows import qwen_windows
from mcore.bridge.features import Features
from mcore.bridge.rules import Copy, Family, GateUp, Qkv, VocabRows

MA, MM = "decoder.layers.{L}.self_attention.", "decoder.layers.{L}.mlp."
H, HA, HM = "model.layers.{L}.", "model.layers.{L}.self_attn.", "model.layers.{L}.mlp."


def transformer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of megatron's `TransformerConfig`."""
    return dense_transformer_config(config, add_qkv_bias=True)


def features(config: Mapping[str, Any]) -> Features:
    """What `TransformerConfig` has no field for: windows."""
    return Features(windows=qwen_windows(config))


# fmt: off
RULES = (
    #              megatron parameter                  shape                  Hugging Face tensors
    VocabRows(     "embedding.word_embeddings.weight", "padded_vocab hidden", "model.embed_tokens.weight"),
    Copy     (MA + "linear_qkv.layer_norm_weight",     "hidden",              H + "input_layernorm.weight"),
    Qkv      (MA + "linear_qkv.weight",                "qkv_rows hidden",     HA + "{q,k,v}_proj.weight"),
    Qkv      (MA + "linear_qkv.bias",                  "qkv_rows",            HA + "{q,k,v}_proj.bias"),
    Copy     (MA + "linear_proj.weight",               "hidden q_rows",       HA + "o_proj.weight"),
    Copy     (MM + "linear_fc1.layer_norm_weight",     "hidden",              H + "post_attention_layernorm.weight"),
    GateUp   (MM + "linear_fc1.weight",                "gate_up_rows hidden", HM + "{gate,up}_proj.weight"),
    Copy     (MM + "linear_fc2.weight",                "hidden ffn",          HM + "down_proj.weight"),
    Copy     (     "decoder.final_layernorm.weight",   "hidden",              "model.norm.weight"),
    VocabRows(     "output_layer.weight",              "padded_vocab hidden", "lm_head.weight", "untied"),
)
# fmt: on

FAMILY = Family(
    name="qwen2",
    hf_architecture="Qwen2ForCausalLM",
    hf_model_type="qwen2",
    needed=("num_key_value_heads",),
    rules=RULES,
    transformer_config=transformer_config,
    features=features,
)
