"""GLM-4 of April 2025 (0414), dense: norms on both sides of attention and MLP, half of a head turned pair by pair.

Hugging Face's `post_attention_layernorm` stands in front of the MLP, as in Llama; the norms behind attention and MLP
are `post_self_attn_layernorm` and `post_mlp_layernorm`.

Source: transformers 5.19 `modeling_glm4.py` and `configuration_glm4.py`; megatron-core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore.bridge.families.dense import dense_transformer_config
from mcore.bridge.families.windows import no_windows
from mcore.bridge.features import Features
from mcore.bridge.rules import Copy, Family, Qkv, VocabRows
from mcore.errors import Problem
from mcore.findings import refuse, together

MA, MM = "decoder.layers.{L}.self_attention.", "decoder.layers.{L}.mlp."
H, HA, HM = "model.layers.{L}.", "model.layers.{L}.self_attn.", "model.layers.{L}.mlp."


def transformer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of megatron's `TransformerConfig`.

    Raises:
        ConfigError: `head_dim` is missing (transformers' default is 128, whatever the hidden size).
    """
    problems = []
    if config.get("head_dim") is None:
        problems.append(Problem("config.json: head_dim", "a number", "nothing", "Write it down; GLM-4's is 128."))
    has_bias = bool(sizes(config)["attention_bias"])
    return together(
        lambda: refuse(problems),
        lambda: dense_transformer_config(config, add_qkv_bias=has_bias, has_partial_rotary=True),
        lambda: {"rotary_interleaved": True},
    )


def sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Whether q, k and v have a bias: they have, unless the config says otherwise."""
    return {"attention_bias": bool(config.get("attention_bias", True))}


def features(config: Mapping[str, Any]) -> Features:
    """What `TransformerConfig` has no field for: where norms stand."""
    return Features(windows=no_windows(config), norm_placement="around")


# fmt: off
RULES = (
    #              megatron parameter                   shape                  Hugging Face tensors
    VocabRows(     "embedding.word_embeddings.weight",  "padded_vocab hidden", "model.embed_tokens.weight"),
    Copy     (MA + "linear_qkv.layer_norm_weight",      "hidden",              H + "input_layernorm.weight"),
    Qkv      (MA + "linear_qkv.weight",                 "qkv_rows hidden",     HA + "{q,k,v}_proj.weight"),
    Qkv      (MA + "linear_qkv.bias",                   "qkv_rows",            HA + "{q,k,v}_proj.bias", "attention_bias"),  # noqa: E501
    Copy     (MA + "linear_proj.weight",                "hidden q_rows",       HA + "o_proj.weight"),
    Copy     (MA + "linear_proj.post_layernorm.weight", "hidden",              H + "post_self_attn_layernorm.weight"),
    Copy     (MM + "linear_fc1.layer_norm_weight",      "hidden",              H + "post_attention_layernorm.weight"),
    # gate's rows first, then up's, on both sides.
    Copy     (MM + "linear_fc1.weight",                 "gate_up_rows hidden", HM + "gate_up_proj.weight"),
    Copy     (MM + "linear_fc2.weight",                 "hidden ffn",          HM + "down_proj.weight"),
    Copy     (MM + "linear_fc2.post_layernorm.weight",  "hidden",              H + "post_mlp_layernorm.weight"),
    Copy     (     "decoder.final_layernorm.weight",    "hidden",              "model.norm.weight"),
    VocabRows(     "output_layer.weight",               "padded_vocab hidden", "lm_head.weight", "untied"),
)
# fmt: on

FAMILY = Family(
    name="glm4",
    hf_architecture="Glm4ForCausalLM",
    hf_model_type="glm4",
    needed=("num_key_value_heads",),
    rules=RULES,
    transformer_config=transformer_config,
    sizes=sizes,
    features=features,
)
