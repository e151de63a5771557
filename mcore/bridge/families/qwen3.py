"""Qwen3, dense: query and key normalised per head, `head_dim` independent of the hidden size.

Source: transformers 5.19 `modeling_qwen3.py`; megatron-core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore.bridge.families.dense import dense_transformer_config
from mcore.bridge.families.windows import qwen_windows
from mcore.bridge.features import Features
from mcore.bridge.rules import Copy, Family, GateUp, Qkv, VocabRows
from mcore.errors import Problem
from mcore.findings import refuse, together

MA, MM = "decoder.layers.{L}.self_attention.", "decoder.layers.{L}.mlp."
H, HA, HM = "model.layers.{L}.", "model.layers.{L}.self_attn.", "model.layers.{L}.mlp."


def transformer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of megatron's `TransformerConfig`.

    Raises:
        ConfigError: `head_dim` is missing; transformers' default is 128, whatever the hidden size.
    """
    problems = []
    if config.get("head_dim") is None:
        problems.append(Problem("config.json: head_dim", "a number", "nothing", "Write it down; Qwen3's is 128."))
    has_bias = bool(config.get("attention_bias"))
    return together(
        lambda: refuse(problems, "the model's sizes can't be read"),
        lambda: dense_transformer_config(config, add_qkv_bias=has_bias, qk_layernorm=True),
    )


def features(config: Mapping[str, Any]) -> Features:
    """What `TransformerConfig` has no field for: windows, and a bias on o but none on the MLP."""
    return Features(windows=qwen_windows(config), attention_output_bias=True if config.get("attention_bias") else None)


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
    Copy     (MM + "linear_fc1.layer_norm_weight",     "hidden",              H + "post_attention_layernorm.weight"),
    GateUp   (MM + "linear_fc1.weight",                "gate_up_rows hidden", HM + "{gate,up}_proj.weight"),
    Copy     (MM + "linear_fc2.weight",                "hidden ffn",          HM + "down_proj.weight"),
    Copy     (     "decoder.final_layernorm.weight",   "hidden",              "model.norm.weight"),
    VocabRows(     "output_layer.weight",              "padded_vocab hidden", "lm_head.weight", "untied"),
)
# fmt: on

FAMILY = Family(
    name="qwen3",
    hf_architecture="Qwen3ForCausalLM",
    hf_model_type="qwen3",
    needed=("num_key_value_heads",),
    rules=RULES,
    transformer_config=transformer_config,
    features=features,
)
