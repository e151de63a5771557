"""Llama 1 to 3.3 and the many models that share its code (SmolLM2, Yi, Granite code, DeepSeek's distillations …).

Source: transformers 5.19 `modeling_llama.py`; megatron-core 0.16.1 `gpt_layer_specs.py` and its global names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore.bridge.families.dense import dense_transformer_config
from mcore.bridge.rules import Copy, Family, GateUp, Qkv, VocabRows
from mcore.errors import ConfigError, Problem

A = "decoder.layers.{L}.self_attention."
F = "decoder.layers.{L}.mlp."
H = "model.layers.{L}."


def transformer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of megatron's `TransformerConfig`.

    Raises:
        ConfigError: Only one of `attention_bias` and `mlp_bias` is set, which megatron has no switch for.
    """
    attention_bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    if attention_bias != mlp_bias:
        raise ConfigError(
            "the model's biases can't be expressed",
            [
                Problem(
                    "config.json: attention_bias, mlp_bias",
                    "both true or both false, as megatron-core's add_bias_linear sets all linear layers",
                    f"{attention_bias}, {mlp_bias}",
                )
            ],
        )
    return dense_transformer_config(config, add_bias_linear=attention_bias)


# fmt: off
FAMILY = Family(
    name="llama",
    hf_architecture="LlamaForCausalLM",
    rules=(
        #             megatron parameter                  shape                  Hugging Face tensors
        VocabRows(    "embedding.word_embeddings.weight", "padded_vocab hidden", "model.embed_tokens.weight"),
        Copy     (A + "linear_qkv.layer_norm_weight",     "hidden",              H + "input_layernorm.weight"),
        Qkv      (A + "linear_qkv.weight",                "qkv_rows hidden",     H + "self_attn.{q,k,v}_proj.weight"),
        Qkv      (A + "linear_qkv.bias",                  "qkv_rows",            H + "self_attn.{q,k,v}_proj.bias", "attention_bias"),
        Copy     (A + "linear_proj.weight",               "hidden q_rows",       H + "self_attn.o_proj.weight"),
        Copy     (A + "linear_proj.bias",                 "hidden",              H + "self_attn.o_proj.bias", "attention_bias"),
        Copy     (F + "linear_fc1.layer_norm_weight",     "hidden",              H + "post_attention_layernorm.weight"),
        GateUp   (F + "linear_fc1.weight",                "gate_up_rows hidden", H + "mlp.{gate,up}_proj.weight"),
        GateUp   (F + "linear_fc1.bias",                  "gate_up_rows",        H + "mlp.{gate,up}_proj.bias", "mlp_bias"),
        Copy     (F + "linear_fc2.weight",                "hidden ffn",          H + "mlp.down_proj.weight"),
        Copy     (F + "linear_fc2.bias",                  "hidden",              H + "mlp.down_proj.bias", "mlp_bias"),
        Copy     (    "decoder.final_layernorm.weight",   "hidden",              "model.norm.weight"),
        VocabRows(    "output_layer.weight",              "padded_vocab hidden", "lm_head.weight", "untied"),
    ),
    # Buffers that transformers before 4.32 saved; they follow from the config.
    ignored_hf=(H + "self_attn.rotary_emb.inv_freq",),
    transformer_config=transformer_config,
)
# fmt: on
