"""Gemma 2: norms on both sides of attention and MLP, zero-centred; capped scores and logits; every other layer slides.

Hugging Face's `post_attention_layernorm` stands behind the attention here, not in front of the MLP as in Llama.

Source: transformers 5.19 `modeling_gemma2.py` and `configuration_gemma2.py`; megatron-core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore.bridge.families.dense import dense_transformer_config
from mcore.bridge.families.windows import FULL, SLIDING, windows_by_layer_type
from mcore.bridge.features import Features
from mcore.bridge.rules import Copy, Family, GateUp, Qkv, VocabRows
from mcore.errors import Problem
from mcore.findings import refuse, together

MA, MM = "decoder.layers.{L}.self_attention.", "decoder.layers.{L}.mlp."
H, HA, HM = "model.layers.{L}.", "model.layers.{L}.self_attn.", "model.layers.{L}.mlp."


def transformer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of megatron's `TransformerConfig`.

    Raises:
        ConfigError: A field is missing that no default of transformers may stand in for, attention is bidirectional,
            or projections have biases.
    """
    return gemma_transformer_config(config, gemma_problems(config))


def gemma_transformer_config(config: Mapping[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """What all Gemmas since the second have in common; `problems` are refused together with it."""
    activation = ("hidden_activation", "gelu_pytorch_tanh", "gelu_tanh")
    return together(
        lambda: refuse(problems),
        lambda: dense_transformer_config(config, activation=activation),
        lambda: {"layernorm_zero_centered_gamma": True, "softmax_scale": config["query_pre_attn_scalar"] ** -0.5},
    )


def gemma_problems(config: Mapping[str, Any]) -> list[Problem]:
    """What keeps a Gemma of the second or third generation from being built."""
    problems = []
    for key in ("head_dim", "query_pre_attn_scalar"):
        found = config.get(key)
        if not isinstance(found, int | float) or found <= 0:
            remedy = "transformers would take 256; write it down if that is meant."
            problems.append(Problem(f"config.json: {key}", "a positive number", repr(found), remedy))
    return problems + [
        Problem(f"config.json: {key}", "false or null", repr(config[key]))
        for key in ("attention_bias", "use_bidirectional_attention")
        if config.get(key)
    ]


def sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the head is the embedding: it is, unless the config says otherwise."""
    return {"tied": bool(config.get("tie_word_embeddings", True))}


def features(config: Mapping[str, Any]) -> Features:
    """What `TransformerConfig` has no field for. Without `layer_types`, every other layer slides, the first one too.

    Raises:
        ConfigError: As `windows_by_layer_type`.
    """
    default = [FULL if layer % 2 else SLIDING for layer in range(config["num_hidden_layers"])]
    return Features(
        windows=windows_by_layer_type(config, window=config.get("sliding_window", 4096), default=default),
        attention_softcap=config.get("attn_logit_softcapping", 50.0),
        logit_softcap=config.get("final_logit_softcapping", 30.0),
        norm_placement="around",
        embedding_scale=config["hidden_size"] ** 0.5,
    )


# fmt: off
RULES = (
    #              megatron parameter                   shape                  Hugging Face tensors
    VocabRows(     "embedding.word_embeddings.weight",  "padded_vocab hidden", "model.embed_tokens.weight"),
    Copy     (MA + "linear_qkv.layer_norm_weight",      "hidden",              H + "input_layernorm.weight"),
    Qkv      (MA + "linear_qkv.weight",                 "qkv_rows hidden",     HA + "{q,k,v}_proj.weight"),
    Copy     (MA + "linear_proj.weight",                "hidden q_rows",       HA + "o_proj.weight"),
    Copy     (MA + "linear_proj.post_layernorm.weight", "hidden",              H + "post_attention_layernorm.weight"),
    Copy     (MM + "linear_fc1.layer_norm_weight",      "hidden",              H + "pre_feedforward_layernorm.weight"),
    GateUp   (MM + "linear_fc1.weight",                 "gate_up_rows hidden", HM + "{gate,up}_proj.weight"),
    Copy     (MM + "linear_fc2.weight",                 "hidden ffn",          HM + "down_proj.weight"),
    Copy     (MM + "linear_fc2.post_layernorm.weight",  "hidden",              H + "post_feedforward_layernorm.weight"),
    Copy     (     "decoder.final_layernorm.weight",    "hidden",              "model.norm.weight"),
    VocabRows(     "output_layer.weight",               "padded_vocab hidden", "lm_head.weight", "untied"),
)
# fmt: on

FAMILY = Family(
    name="gemma2",
    hf_architecture="Gemma2ForCausalLM",
    hf_model_type="gemma2",
    needed=("num_key_value_heads",),
    rules=RULES,
    transformer_config=transformer_config,
    sizes=sizes,
    features=features,
)
