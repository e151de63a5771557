"""Mistakes with DeepSeek's and GLM's architectures: latent attention, groups of experts, the router's bias."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcore.verify.mutants.mutant import (
    L2,
    Mutant,
    change,
    change_each,
    plain_rope,
    rolled,
    set_rope,
    setting,
    swap,
    zero,
)

if TYPE_CHECKING:
    from torch import Tensor

A2, M2 = L2 + "self_attn.", L2 + "mlp."
NUM_HEADS, NOPE, ROPE, VALUE, KV_LORA = 4, 12, 8, 10, 24
"""Sizes of the tiny models (`tiny_models`): heads, parts of a head, and the latent of key and value."""


def _keys_then_values(kv_b: Tensor) -> Tensor:
    """Rows as if a head's keys and values stood apart: all heads' keys first."""
    head = NOPE + VALUE
    rows = [
        number * head + row for part in (range(NOPE), range(NOPE, head)) for number in range(NUM_HEADS) for row in part
    ]
    return kv_b[rows]


def _rope_part_first(kv_a: Tensor) -> Tensor:
    """Rows of the rotated key before those of the latent."""
    return kv_a.roll(ROPE, dims=0)


def _half_by_half(kv_a: Tensor) -> Tensor:
    """Rows of the rotated key as if rotary pairs were half a head apart."""
    rows = list(range(KV_LORA)) + [KV_LORA + i for i in (*range(0, ROPE, 2), *range(1, ROPE, 2))]
    return kv_a[rows]


# fmt: off
MUTANTS: tuple[Mutant, ...] = (
    Mutant("deepseek_v2_groups_ignored", "deepseek_v2", "experts chosen from all groups", "layers.1.mlp",
           config=setting(topk_method="greedy")),
    Mutant("deepseek_v2_scaling_factor", "deepseek_v2", "routed experts not scaled", "layers.1.mlp",
           config=setting(routed_scaling_factor=1.0)),
    Mutant("deepseek_v2_mscale", "deepseek_v2", "mscale_all_dim overlooked", "layers.0.attention",
           config=set_rope(mscale_all_dim=0.0)),
    Mutant("deepseek_v2_yarn_factor_40", "deepseek_v2", "YaRN factor 40 for 4 (megatron's default)",
           "layers.0.attention", config=set_rope(factor=40.0)),
    Mutant("deepseek_v2_keys_then_values", "deepseek_v2", "kv_b of one layer as [keys; values], not by head",
           "layers.2.attention", tensors=change(A2 + "kv_b_proj.weight", _keys_then_values)),
    Mutant("deepseek_v3_router_bias_dropped", "deepseek_v3", "correction bias of the router left at zero",
           "layers.1.mlp", tensors=change_each("e_score_correction_bias", zero)),
    Mutant("deepseek_v3_router_bias_rotated", "deepseek_v3", "correction bias of one layer one expert on",
           "layers.2.mlp", tensors=change(M2 + "gate.e_score_correction_bias", rolled)),
    Mutant("deepseek_v3_groups", "deepseek_v3", "experts from three groups for two", "layers.1.mlp",
           config=setting(topk_group=3)),
    Mutant("deepseek_v3_not_normalised", "deepseek_v3", "weights of the chosen experts not normalised", "layers.1.mlp",
           config=setting(norm_topk_prob=False)),
    Mutant("deepseek_v3_scaling_factor", "deepseek_v3", "routed experts not scaled", "layers.1.mlp",
           config=setting(routed_scaling_factor=1.0)),
    Mutant("deepseek_v3_yarn_dropped", "deepseek_v3", "YaRN overlooked, its softmax factor too", "layers.0.attention",
           config=plain_rope),
    Mutant("deepseek_v3_rope_part_first", "deepseek_v3", "kv_a of one layer with the rotated key before the latent",
           "layers.2.attention", tensors=change(A2 + "kv_a_proj_with_mqa.weight", _rope_part_first)),
    Mutant("deepseek_v3_rotary_half_by_half", "deepseek_v3", "the rotated key's rows of one layer in another order",
           "layers.2.attention", tensors=change(A2 + "kv_a_proj_with_mqa.weight", _half_by_half)),
    Mutant("deepseek_v3_latent_norm_initial", "deepseek_v3", "norm of the key-value latent left at its initial ones",
           "layers.2.attention", tensors=change(A2 + "kv_a_layernorm.weight", lambda norm: norm * 0 + 1)),
    Mutant("deepseek_v3_shared_gate_up_swapped", "deepseek_v3", "gate taken for up in the shared experts",
           "layers.2.mlp",
           tensors=swap(M2 + "shared_experts.gate_proj.weight", M2 + "shared_experts.up_proj.weight")),
    Mutant("glm4_moe_router_bias_dropped", "glm4_moe", "correction bias of the router left at zero", "layers.1.mlp",
           tensors=change_each("e_score_correction_bias", zero)),
    Mutant("glm4_moe_rotary_whole", "glm4_moe", "the whole head rotated, not half of it", "layers.0.attention",
           config=set_rope(partial_rotary_factor=1.0)),
    Mutant("glm4_moe_qk_norms_swapped", "glm4_moe", "q_norm of one layer taken for k_norm", "layers.2.attention",
           tensors=swap(A2 + "q_norm.weight", A2 + "k_norm.weight")),
)
# fmt: on
