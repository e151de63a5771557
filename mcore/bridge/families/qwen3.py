"""Qwen3, dense: no bias, query and key normalised per head, `head_dim` independent of the hidden size.

Source: transformers 5.19 `modeling_qwen3.py`; megatron-core 0.16.1.
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
        ConfigError: `head_dim` is missing (transformers' default is 128, whatever the hidden size), or
            `attention_bias` is set (it puts a bias on o but none on the MLP, which megatron has no switch for).
    """
    problems = []
    if config.get("head_dim") is None:
        problems.append(Problem("config.json: head_dim", "a number", "nothing", "Write it down; Qwen3's is 128."))
    if config.get("attention_bias"):
        problems.append(Problem("config.json: attention_bias", "false", "true"))
    if problems:
        raise ConfigError("the model can't be expressed", problems)
    return dense_transformer_config(config, qk_layernorm=True)


# fmt: off
FAMILY = Family(
    name="qwen3",
    hf_architecture="Qwen3ForCausalLM",
    rules=(
        #             megatron parameter                  shape                  Hugging Face tensors
        VocabRows(    "embedding.word_embeddings.weight", "padded_vocab hidden", "model.embed_tokens.weight"),
        Copy     (A + "linear_qkv.layer_norm_weight",     "hidden",              H + "input_layernorm.weight"),
        Qkv      (A + "linear_qkv.weight",                "qkv_rows hidden",     H + "self_attn.{q,k,v}_proj.weight"),
        Copy     (A + "q_layernorm.weight",               "head_dim",            H + "self_attn.q_norm.weight"),
        Copy     (A + "k_layernorm.weight",               "head_dim",            H + "self_attn.k_norm.weight"),
        Copy     (A + "linear_proj.weight",               "hidden q_rows",       H + "self_attn.o_proj.weight"),
        Copy     (F + "linear_fc1.layer_norm_weight",     "hidden",              H + "post_attention_layernorm.weight"),
        GateUp   (F + "linear_fc1.weight",                "gate_up_rows hidden", H + "mlp.{gate,up}_proj.weight"),
        Copy     (F + "linear_fc2.weight",                "hidden ffn",          H + "mlp.down_proj.weight"),
        Copy     (    "decoder.final_layernorm.weight",   "hidden",              "model.norm.weight"),
        VocabRows(    "output_layer.weight",              "padded_vocab hidden", "lm_head.weight", "untied"),
    ),
    transformer_config=transformer_config,
)
# fmt: on
