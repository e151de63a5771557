"""Phi-3, Phi-3.5 and Phi-4, dense: q, k and v in one tensor, gate and up in another, LongRoPE, partial rotary.

Source: transformers 5.19 `modeling_phi3.py` and `configuration_phi3.py`; megatron-core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore.bridge.families.dense import dense_transformer_config
from mcore.bridge.families.windows import windows_of_all
from mcore.bridge.features import Features
from mcore.bridge.rules import Copy, Family, FusedQkv, VocabRows

MA, MM = "decoder.layers.{L}.self_attention.", "decoder.layers.{L}.mlp."
H, HA, HM = "model.layers.{L}.", "model.layers.{L}.self_attn.", "model.layers.{L}.mlp."


def transformer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of megatron's `TransformerConfig`."""
    return dense_transformer_config(config, has_partial_rotary=True)


def features(config: Mapping[str, Any]) -> Features:
    """What `TransformerConfig` has no field for: windows."""
    return Features(windows=windows_of_all(config, default=None))


# fmt: off
RULES = (
    #              megatron parameter                  shape                  Hugging Face tensors
    VocabRows(     "embedding.word_embeddings.weight", "padded_vocab hidden", "model.embed_tokens.weight"),
    Copy     (MA + "linear_qkv.layer_norm_weight",     "hidden",              H + "input_layernorm.weight"),
    FusedQkv (MA + "linear_qkv.weight",                "qkv_rows hidden",     HA + "qkv_proj.weight"),
    Copy     (MA + "linear_proj.weight",               "hidden q_rows",       HA + "o_proj.weight"),
    Copy     (MM + "linear_fc1.layer_norm_weight",     "hidden",              H + "post_attention_layernorm.weight"),
    # gate's rows first, then up's, on both sides.
    Copy     (MM + "linear_fc1.weight",                "gate_up_rows hidden", HM + "gate_up_proj.weight"),
    Copy     (MM + "linear_fc2.weight",                "hidden ffn",          HM + "down_proj.weight"),
    Copy     (     "decoder.final_layernorm.weight",   "hidden",              "model.norm.weight"),
    VocabRows(     "output_layer.weight",              "padded_vocab hidden", "lm_head.weight", "untied"),
)
# fmt: on

FAMILY = Family(
    name="phi3",
    hf_architecture="Phi3ForCausalLM",
    hf_model_type="phi3",
    rules=RULES,
    transformer_config=transformer_config,
    features=features,
)
