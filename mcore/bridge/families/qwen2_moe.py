"""Qwen2 and Qwen1.5 with experts: a shared expert behind a gate of its own, and q, k and v with a bias.

Source: transformers 5.19 `modeling_qwen2_moe.py`, `conversion_mapping.py` (names in files); megatron-core 0.16.1
`shared_experts.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore.bridge.families.dense import dense_transformer_config
from mcore.bridge.families.moe import expert_arguments, expert_sizes, qwen_moe_layers
from mcore.bridge.families.windows import FULL, SLIDING, layers_with_windows, windows_by_layer_type
from mcore.bridge.features import Features
from mcore.bridge.rules import Copy, Family, GateUp, Qkv, VocabRows
from mcore.errors import Problem
from mcore.findings import refuse, together

M, MA, MM = "decoder.layers.{L}.", "decoder.layers.{L}.self_attention.", "decoder.layers.{L}.mlp."
MX, MS = "decoder.layers.{L}.mlp.experts.experts.", "decoder.layers.{L}.mlp.shared_experts."
H, HA, HM = "model.layers.{L}.", "model.layers.{L}.self_attn.", "model.layers.{L}.mlp."
HX, HS = "model.layers.{L}.mlp.experts.{E}.", "model.layers.{L}.mlp.shared_expert."


def transformer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of megatron's `TransformerConfig`."""
    has_bias = bool(config.get("qkv_bias", True))
    return together(lambda: dense_transformer_config(config, add_qkv_bias=has_bias), lambda: _experts(config))


def _experts(config: Mapping[str, Any]) -> dict[str, Any]:
    own = sizes(config)
    experts = expert_arguments(config, own, is_normalised=bool(config.get("norm_topk_prob", False)))
    shared = {"moe_shared_expert_intermediate_size": own["shared_ffn"], "moe_shared_expert_gate": True}
    return experts and experts | shared


def sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes and switches that the table names.

    Raises:
        ConfigError: Sizes are missing or no positive integers.
    """
    shared_ffn, problems = config.get("shared_expert_intermediate_size"), []
    if not isinstance(shared_ffn, int) or shared_ffn < 1:
        text = "a positive integer"
        problems.append(Problem("config.json: shared_expert_intermediate_size", text, repr(shared_ffn)))
    return together(
        lambda: refuse(problems, "the model's sizes can't be read"),
        lambda: expert_sizes(config, experts=("num_experts",), moe_ffn="moe_intermediate_size"),
        lambda: {"moe_layers": qwen_moe_layers(config)},
        lambda: {"shared_ffn": shared_ffn, "qkv_bias": bool(config.get("qkv_bias", True))},
    )


def features(config: Mapping[str, Any]) -> Features:
    """What `TransformerConfig` has no field for: windows, by default in every other one of the first layers."""
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    end = layers_with_windows(config, default=28)
    types = [
        SLIDING if layer % 2 == 0 and layer < end and window else FULL for layer in range(config["num_hidden_layers"])
    ]
    return Features(windows=windows_by_layer_type(config, window=window, default=types))


# fmt: off
RULES = (
    #              megatron parameter                  shape                  Hugging Face tensors
    VocabRows(     "embedding.word_embeddings.weight", "padded_vocab hidden", "model.embed_tokens.weight"),
    Copy     (MA + "linear_qkv.layer_norm_weight",     "hidden",              H + "input_layernorm.weight"),
    Qkv      (MA + "linear_qkv.weight",                "qkv_rows hidden",     HA + "{q,k,v}_proj.weight"),
    Qkv      (MA + "linear_qkv.bias",                  "qkv_rows",            HA + "{q,k,v}_proj.bias", "qkv_bias"),
    Copy     (MA + "linear_proj.weight",               "hidden q_rows",       HA + "o_proj.weight"),
    Copy     (MM + "linear_fc1.layer_norm_weight",     "hidden",              H + "post_attention_layernorm.weight", "dense"),  # noqa: E501
    GateUp   (MM + "linear_fc1.weight",                "gate_up_rows hidden", HM + "{gate,up}_proj.weight", "dense"),
    Copy     (MM + "linear_fc2.weight",                "hidden ffn",          HM + "down_proj.weight", "dense"),
    Copy     (M  + "pre_mlp_layernorm.weight",         "hidden",              H + "post_attention_layernorm.weight", "moe"),  # noqa: E501
    Copy     (MM + "router.weight",                    "experts hidden",      HM + "gate.weight", "moe"),
    GateUp   (MX + "linear_fc1.weight",                "2*moe_ffn hidden",    HX + "{gate,up}_proj.weight", "moe"),
    Copy     (MX + "linear_fc2.weight",                "hidden moe_ffn",      HX + "down_proj.weight", "moe"),
    GateUp   (MS + "linear_fc1.weight",                "2*shared_ffn hidden", HS + "{gate,up}_proj.weight", "moe"),
    Copy     (MS + "linear_fc2.weight",                "hidden shared_ffn",   HS + "down_proj.weight", "moe"),
    Copy     (MS + "gate_weight",                      "1 hidden",            HM + "shared_expert_gate.weight", "moe"),
    Copy     (     "decoder.final_layernorm.weight",   "hidden",              "model.norm.weight"),
    VocabRows(     "output_layer.weight",              "padded_vocab hidden", "lm_head.weight", "untied"),
)
# fmt: on

FAMILY = Family(
    name="qwen2_moe",
    hf_architecture="Qwen2MoeForCausalLM",
    hf_model_type="qwen2_moe",
    needed=("num_key_value_heads",),
    rules=RULES,
    transformer_config=transformer_config,
    sizes=sizes,
    features=features,
)
