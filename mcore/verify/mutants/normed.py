"""Mistakes with dense decoders beside the plain ones: windows, fused tensors, norms of every placement, caps."""

from __future__ import annotations

from mcore.bridge.rules import Copy
from mcore.verify.mutants import wrong_rows as wrong
from mcore.verify.mutants.mutant import (
    L2,
    Config,
    Mutant,
    change,
    change_each,
    halves_swapped,
    plain_rope,
    set_rope,
    setting,
)


def _windows_on_the_other_layers(config: Config) -> None:
    other = {"sliding_attention": "full_attention", "full_attention": "sliding_attention"}
    config["layer_types"] = [other[kind] for kind in config["layer_types"]]


def _one_rope_for_all(config: Config) -> None:
    ropes = config["rope_parameters"]
    ropes["sliding_attention"] = dict(ropes["full_attention"])


def _global_rope_unscaled(config: Config) -> None:
    plain_rope(global_rope := {"rope_parameters": config["rope_parameters"]["full_attention"]})
    config["rope_parameters"]["full_attention"] = global_rope["rope_parameters"]


def _short_for_long(config: Config) -> None:
    config["rope_parameters"]["long_factor"] = config["rope_parameters"]["short_factor"]


# fmt: off
MUTANTS: tuple[Mutant, ...] = (
    Mutant("mistral_window_one_short", "mistral", "window of w - 1 tokens for w", "layers.0.attention",
           config=setting(sliding_window=8)),
    Mutant("mistral_window_dropped", "mistral", "sliding window overlooked", "layers.0.attention",
           config=setting(sliding_window=None)),
    Mutant("mistral_yarn_dropped", "mistral", "YaRN overlooked", "layers.0.attention", config=plain_rope),
    Mutant("mistral_yarn_attention_factor", "mistral", "YaRN without its attention factor", "layers.0.attention",
           config=set_rope(attention_factor=1.0)),
    Mutant("ministral_windows_on_other_layers", "ministral", "windows on the layers that have none, and the other way",
           "layers.0.attention", config=_windows_on_the_other_layers),
    Mutant("ministral3_queries_do_not_grow", "ministral3", "queries do not grow with their position",
           "layers.0.attention", config=set_rope(llama_4_scaling_beta=0.0)),
    Mutant("phi3_qkv_by_group", "phi3", "fused QKV taken for grouped rows", "layers.0.attention",
           rows=wrong.with_class(Copy, "linear_qkv.weight")),
    Mutant("phi3_gate_up_swapped", "phi3", "up's half of gate_up_proj taken for gate's", "layers.2.mlp",
           tensors=change(L2 + "mlp.gate_up_proj.weight", halves_swapped)),
    Mutant("phi3_longrope_short_for_long", "phi3", "longrope's short factors past the original context",
           "layers.0.attention", config=_short_for_long),
    Mutant("phi3_longrope_dropped", "phi3", "longrope overlooked", "layers.0.attention", config=plain_rope),
    Mutant("gemma2_norm_not_zero_centred", "gemma2", "weights of zero-centred norms stored as weight + 1",
           "layers.0.attention", tensors=change_each("norm.weight", lambda norm: norm + 1)),
    Mutant("gemma2_norm_names_as_llama", "gemma2", "post-attention norm taken for the MLP's input norm",
           "layers.0.attention",
           rows=wrong.with_hf_names_swapped("post_attention_layernorm", "pre_feedforward_layernorm")),
    Mutant("gemma2_attention_cap_dropped", "gemma2", "cap of the attention scores overlooked", "layers.0.attention",
           config=setting(attn_logit_softcapping=None)),
    Mutant("gemma2_logit_cap_dropped", "gemma2", "cap of the logits overlooked", "head",
           config=setting(final_logit_softcapping=None)),
    Mutant("gemma2_softmax_scale", "gemma2", "softmax scaled by head_dim, not query_pre_attn_scalar",
           "layers.0.attention", config=setting(query_pre_attn_scalar=16)),
    Mutant("gemma2_windows_on_other_layers", "gemma2", "windows on odd layers, not even ones", "layers.0.attention",
           config=_windows_on_the_other_layers),
    Mutant("gemma3_one_rope", "gemma3", "global rotary embedding on local layers too", "layers.0.attention",
           config=_one_rope_for_all),
    Mutant("gemma3_global_factor_dropped", "gemma3", "global rotary embedding without its linear factor",
           "layers.2.attention", config=_global_rope_unscaled),
    Mutant("gemma3_qk_norms_swapped", "gemma3", "q_norm taken for k_norm", "layers.0.attention",
           rows=wrong.with_hf_names_swapped("q_norm", "k_norm")),
    Mutant("glm4_rotary_half_by_half", "glm4", "q and k rows as if rotary pairs were half a head apart",
           "layers.0.attention", rows=wrong.with_class(wrong.QkvInterleavedRotary, "linear_qkv.weight")),
    Mutant("glm4_rotary_whole", "glm4", "the whole head rotated, not half of it", "layers.0.attention",
           config=set_rope(partial_rotary_factor=1.0)),
    Mutant("glm4_sandwich_norms_swapped", "glm4", "norm behind the attention taken for the one behind the MLP",
           "layers.0.attention",
           rows=wrong.with_hf_names_swapped("post_self_attn_layernorm", "post_mlp_layernorm")),
    Mutant("olmo2_post_norms_swapped", "olmo2", "norm behind the attention taken for the one behind the MLP",
           "layers.0.attention",
           rows=wrong.with_hf_names_swapped("post_attention_layernorm", "post_feedforward_layernorm")),
    Mutant("olmo2_eps", "olmo2", "norm epsilon 1e-5 for 1e-3", "layers.0.attention",
           config=setting(rms_norm_eps=1e-5)),
)
# fmt: on
