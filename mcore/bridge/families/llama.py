"""Llama 1 to 3.3 and the many models that share its code (SmolLM2, Yi, Granite code, DeepSeek's distillations …).

Source: transformers 5.19 `modeling_llama.py`; megatron-core 0.16.1 `gpt_layer_specs.py` and its global names.
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
    return dense_transformer_config(
        config, add_qkv_bias=bool(config.get("attention_bias")), add_bias_linear=bool(config.get("mlp_bias"))
    )


def features(config: Mapping[str, Any]) -> Features:
    """What `TransformerConfig` has no field for: a bias on all of the attention, or on none of it, whatever MLPs have.

    Raises:
        ConfigError: `layer_types` asks for windows, which transformers' Llama lacks and vLLM's has.
    """
    attention_bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    differs = attention_bias if attention_bias != mlp_bias else None
    return Features(windows=no_windows(config), attention_output_bias=differs, attention_input_bias=differs)


# fmt: off
RULES = (
    #              megatron parameter                  shape                  Hugging Face tensors
    VocabRows(     "embedding.word_embeddings.weight", "padded_vocab hidden", "model.embed_tokens.weight"),
    Copy     (MA + "linear_qkv.layer_norm_weight",     "hidden",              H + "input_layernorm.weight"),
    Qkv      (MA + "linear_qkv.weight",                "qkv_rows hidden",     HA + "{q,k,v}_proj.weight"),
    Qkv      (MA + "linear_qkv.bias",                  "qkv_rows",            HA + "{q,k,v}_proj.bias", "attention_bias"),  # noqa: E501
    Copy     (MA + "linear_proj.weight",               "hidden q_rows",       HA + "o_proj.weight"),
    Copy     (MA + "linear_proj.bias",                 "hidden",              HA + "o_proj.bias", "attention_bias"),
    Copy     (MM + "linear_fc1.layer_norm_weight",     "hidden",              H + "post_attention_layernorm.weight"),
    GateUp   (MM + "linear_fc1.weight",                "gate_up_rows hidden", HM + "{gate,up}_proj.weight"),
    GateUp   (MM + "linear_fc1.bias",                  "gate_up_rows",        HM + "{gate,up}_proj.bias", "mlp_bias"),
    Copy     (MM + "linear_fc2.weight",                "hidden ffn",          HM + "down_proj.weight"),
    Copy     (MM + "linear_fc2.bias",                  "hidden",              HM + "down_proj.bias", "mlp_bias"),
    Copy     (     "decoder.final_layernorm.weight",   "hidden",              "model.norm.weight"),
    VocabRows(     "output_layer.weight",              "padded_vocab hidden", "lm_head.weight", "untied"),
)
# fmt: on

FAMILY = Family(
    name="llama",
    hf_architecture="LlamaForCausalLM",
    hf_model_type="llama",
    rules=RULES,
    # Buffers that transformers before 4.32 saved; they follow from the config.
    ignored_hf=(HA + "rotary_emb.inv_freq",),
    transformer_config=transformer_config,
    features=features,
)
