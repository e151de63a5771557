"""What kind of value each key of a `config.json` must have that is read here. No torch here.

A wrong kind would often be taken for something else in silence (the text "false" is true), or stop far from its cause.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore.errors import Problem

# fmt: off
INTEGERS = frozenset((
    "decoder_sparse_step", "first_k_dense_replace", "head_dim", "hidden_size", "intermediate_size", "kv_lora_rank",
    "max_position_embeddings", "max_window_layers", "moe_intermediate_size", "moe_layer_freq", "n_group",
    "n_routed_experts", "n_shared_experts", "num_attention_heads", "num_experts", "num_experts_per_tok",
    "num_hidden_layers", "num_key_value_heads", "num_labels", "num_local_experts", "num_nextn_predict_layers",
    "original_max_position_embeddings", "pad_token_id", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
    "shared_expert_intermediate_size", "sliding_window", "sliding_window_pattern", "topk_group", "v_head_dim",
    "vocab_size",
))
NUMBERS = frozenset((
    "attention_dropout", "attention_factor", "attn_logit_softcapping", "beta_fast", "beta_slow", "clip_qkv",
    "embd_pdrop", "factor", "final_logit_softcapping", "high_freq_factor", "low_freq_factor", "mscale",
    "mscale_all_dim", "partial_rotary_factor", "query_pre_attn_scalar", "resid_pdrop", "rms_norm_eps",
    "rope_local_base_freq", "rope_theta", "routed_scaling_factor", "router_jitter_noise", "swiglu_alpha",
    "swiglu_limit",
))
SWITCHES = frozenset((
    "attention_bias", "is_causal", "mlp_bias", "norm_topk_prob", "qkv_bias", "rope_interleave", "tie_word_embeddings",
    "truncate", "use_bidirectional_attention", "use_qk_norm", "use_sliding_window",
))
WORDS = frozenset(("hidden_act", "hidden_activation", "model_type", "rope_type", "scoring_func", "topk_method"))
LISTS: Mapping[str, tuple[type | tuple[type, ...], str]] = {
    **dict.fromkeys(("architectures", "layer_types"), (str, "texts")),
    **dict.fromkeys(("long_factor", "mlp_only_layers", "short_factor"), ((int, float), "numbers")),
}
MAPPINGS = frozenset(("per_layer_config", "quantization_config", "rope_parameters", "rope_scaling", "text_config"))
# fmt: on

LARGEST = {
    "num_hidden_layers": 1024,
    "num_nextn_predict_layers": 64,
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts"), 4096),
}
"""Far more than any model has. Names of so many tensors can still be listed; of a million times as many they can't."""
LARGEST_INTEGER = 2**31 - 1


def kind_problems(config: Mapping[str, Any], place: str = "config.json: ") -> list[Problem]:
    """Every value of a wrong kind, those of nested models and rope settings included. null is allowed everywhere."""
    problems = []
    for key, value in config.items():
        if value is None:
            continue
        if (expected := _expected(key, value)) is not None:
            problems.append(Problem(f"{place}{key}", f"{expected}, or null", repr(value)[:200]))
        elif isinstance(value, Mapping) and (
            key in MAPPINGS - {"per_layer_config", "quantization_config"} or "rope_parameters." in place
        ):
            problems += kind_problems(value, f"{place}{key}.")
    return problems


def _expected(key: str, value: Any) -> str | None:
    """What the value should be; None if it is that."""
    is_integer = type(value) is int
    if key in INTEGERS:
        largest, smallest = LARGEST.get(key, LARGEST_INTEGER), -1 if key.endswith("_id") else 0
        return None if is_integer and smallest <= value <= largest else f"an integer from {smallest} to {largest}"
    if key in NUMBERS:
        return None if isinstance(value, float) or (is_integer and abs(value) <= 10**18) else "a number"
    if key in SWITCHES:
        return None if isinstance(value, bool) else "true or false"
    if key in WORDS:
        return None if isinstance(value, str) else "a text"
    if key in LISTS:
        kind, name = LISTS[key]
        is_one = isinstance(value, list) and all(isinstance(item, kind) for item in value)
        return None if is_one else f"a list of {name}"
    return None if key not in MAPPINGS or isinstance(value, Mapping) else "an object"
