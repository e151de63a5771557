"""What DeepSeek-V2 and DeepSeek-V3 share: multi-latent attention (MLA), and the table.

Source: transformers 5.19 `modeling_deepseek_v2.py`, `modeling_deepseek_v3.py`; megatron-core 0.16.1
`multi_latent_attention.py` and its global names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore.backend.rope_scaling import rope_parameters
from mcore.bridge.families import deepseek_moe
from mcore.bridge.families.dense import dense_transformer_config
from mcore.bridge.rules import Copy, VocabRows, mtp_rules
from mcore.errors import ConfigError, Problem
from mcore.findings import refuse, together

M, MA = "decoder.layers.{L}.", "decoder.layers.{L}.self_attention."
H, HA = "model.layers.{L}.", "model.layers.{L}.self_attn."

COUNTS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", *deepseek_moe.COUNTS)
"""Keys of `config.json` that must be positive integers, beside those of every decoder."""

ONLY: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "moe_layer_freq": (1,),
    "rope_interleave": (True,),
}
"""Keys that may be missing, or one of these values: for others there is no row, or transformers does not do what
the key says."""

ROPE_TYPES = ("default", "linear", "yarn", "llama3")
"""Those whose frequencies are the same at every length, and that have the factor which the softmax's scale asks for."""

# fmt: off
ATTENTION_RULES = (
    #         megatron parameter                     shape                      Hugging Face tensors
    Copy(M  + "input_layernorm.weight",              "hidden",                  H  + "input_layernorm.weight"),
    Copy(MA + "linear_q_proj.weight",                "heads*qk_dim hidden",     HA + "q_proj.weight", "!q_lora"),
    Copy(MA + "linear_q_down_proj.weight",           "q_lora hidden",           HA + "q_a_proj.weight", "q_lora"),
    Copy(MA + "linear_q_up_proj.layer_norm_weight",  "q_lora",                  HA + "q_a_layernorm.weight", "q_lora"),
    Copy(MA + "linear_q_up_proj.weight",             "heads*qk_dim q_lora",     HA + "q_b_proj.weight", "q_lora"),
    Copy(MA + "linear_kv_down_proj.weight",          "kv_down_rows hidden",     HA + "kv_a_proj_with_mqa.weight"),
    Copy(MA + "linear_kv_up_proj.layer_norm_weight", "kv_lora",                 HA + "kv_a_layernorm.weight"),
    Copy(MA + "linear_kv_up_proj.weight",            "heads*kv_up_dim kv_lora", HA + "kv_b_proj.weight"),
    Copy(MA + "linear_proj.weight",                  "hidden heads*v_dim",      HA + "o_proj.weight"),
)
LAYER_RULES = (*ATTENTION_RULES, *deepseek_moe.MLP_RULES)
RULES = (
    VocabRows("embedding.word_embeddings.weight",    "padded_vocab hidden",     "model.embed_tokens.weight"),
    *LAYER_RULES,
    *mtp_rules(LAYER_RULES),
    *deepseek_moe.MTP_RULES,
    Copy(     "decoder.final_layernorm.weight",      "hidden",                  "model.norm.weight"),
    VocabRows("output_layer.weight",                 "padded_vocab hidden",     "lm_head.weight", "untied"),
)
# fmt: on


def sizes(config: Mapping[str, Any], *, router_bias: bool) -> Mapping[str, Any]:
    """Sizes and switches that the table names.

    Raises:
        ConfigError: Keys are missing, no positive integers, or contradict each other; lists all of them.
    """
    if problems := deepseek_moe.missing_counts(config, COUNTS) + deepseek_moe.other_names(config):
        raise ConfigError("the model's sizes can't be read", problems)
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    return {
        **deepseek_moe.moe_sizes(config, router_bias=router_bias),
        "q_lora": config.get("q_lora_rank") or 0,
        "kv_lora": config["kv_lora_rank"],
        "qk_dim": nope + rope,
        "kv_down_rows": config["kv_lora_rank"] + rope,
        "kv_up_dim": nope + value,
        "v_dim": value,
    }


def latent_transformer_config(
    config: Mapping[str, Any], only: Mapping[str, tuple[Any, ...]], *, has_groups: bool = True
) -> dict[str, Any]:
    """Arguments of megatron's `MLATransformerConfig`.

    Args:
        config: The model's `config.json`.
        only: Keys that may be missing, or one of these values, beside those of `ONLY`.
        has_groups: Whether a token's experts come from some groups only.

    Raises:
        ConfigError: What can't be built; lists every key.
    """
    problems = deepseek_moe.other_values(config, {**ONLY, **only})
    heads = config.get("num_attention_heads")
    if (config.get("num_key_value_heads") or heads) != heads:
        text = f"num_attention_heads {heads}, as every head has a key of its own"
        problems.append(Problem("config.json: num_key_value_heads", text, str(config["num_key_value_heads"])))
    if "head_dim" in config and config["head_dim"] != config.get("qk_rope_head_dim"):
        text = f"{config.get('qk_rope_head_dim')}, as qk_rope_head_dim, or no such key"
        problems.append(Problem("config.json: head_dim", text, repr(config["head_dim"])))
    arguments = together(
        lambda: refuse(deepseek_moe.missing_counts(config, COUNTS)),
        lambda: refuse(problems),
        lambda: dense_transformer_config(config),
        lambda: deepseek_moe.moe_arguments(config, has_groups=has_groups),
        lambda: _latent_arguments(config),
        lambda: _rope_arguments(config),
    )
    for of_plain_attention in ("num_query_groups", "kv_channels"):
        del arguments[of_plain_attention]
    return arguments


def _latent_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "multi_latent_attention": True,
        "qk_layernorm": True,  # the norms of the latents
        "q_lora_rank": config.get("q_lora_rank"),
        "kv_lora_rank": config["kv_lora_rank"],
        "qk_head_dim": config["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": config["qk_rope_head_dim"],
        "v_head_dim": config["v_head_dim"],
    }


def _rope_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the softmax scale follows from; the frequencies and their factor are transformers' own (`backend/mla.py`).

    Every argument is named, as megatron's defaults are those of a YaRN of factor 40.

    Raises:
        ConfigError: The rope type can't be built for latents.
    """
    ropes = rope_parameters(config)
    kinds = [str(rope["rope_type"]) for rope in ropes.values()]
    if len(ropes) != 1 or "" not in ropes or kinds[0] not in ROPE_TYPES:
        text = f"one of {', '.join(ROPE_TYPES)} for latent attention"
        problem = Problem("config.json: rope_parameters.rope_type", text, ", ".join(kinds))
        raise ConfigError("the model's rotary embedding can't be built", [problem])
    rope = ropes[""]
    is_scaled = rope["rope_type"] != "default"
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": rope["factor"] if is_scaled else 1.0,
        "mscale": rope.get("mscale") or 1.0,
        "mscale_all_dim": rope.get("mscale_all_dim") or 0.0,
        "original_max_position_embeddings": rope.get("original_max_position_embeddings") or 4096,
        "beta_fast": rope.get("beta_fast") or 32.0,
        "beta_slow": rope.get("beta_slow") or 1.0,
        "rotary_base": rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
        "rotary_percent": 1.0,
    }
