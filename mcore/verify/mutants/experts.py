"""Mistakes with mixtures of experts: routing, the order of experts, shared experts, sinks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcore.bridge.rules import Copy
from mcore.verify.mutants import wrong_rows as wrong
from mcore.verify.mutants.mutant import (
    L2,
    Config,
    Mutant,
    Tensors,
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

M2 = L2 + "mlp."


def _experts_rotated(tensors: Tensors) -> None:
    """Layer 2's stacked experts each one place on, their router left as it is."""
    for name in tensors:
        if name.startswith(M2 + "experts."):
            tensors[name] = tensors[name].roll(1, dims=0)


def _square_transposed(weight: Tensor) -> Tensor:
    return weight.transpose(1, 2)


def _windows_on_the_other_layers(config: Config) -> None:
    config["layer_types"] = config["layer_types"][::-1]


# fmt: off
MUTANTS: tuple[Mutant, ...] = (
    Mutant("mixtral_w1_w3_swapped", "mixtral", "w3 taken for the gate", "layers.0.mlp",
           rows=wrong.with_hf_names_swapped("{w1,w3}", "{w3,w1}")),
    Mutant("mixtral_experts_swapped", "mixtral", "w2 of two experts of one layer change places", "layers.2.mlp",
           tensors=swap(L2 + "block_sparse_moe.experts.0.w2.weight", L2 + "block_sparse_moe.experts.3.w2.weight")),
    Mutant("mixtral_top_3", "mixtral", "three experts a token for two", "layers.0.mlp",
           config=setting(num_experts_per_tok=3)),
    Mutant("qwen2_moe_shared_gate_dropped", "qwen2_moe", "gate of the shared expert left at its initial zeros",
           "layers.2.mlp", tensors=change(M2 + "shared_expert_gate.weight", zero)),
    Mutant("qwen2_moe_probabilities_normalised", "qwen2_moe", "probabilities of the chosen experts normalised",
           "layers.0.mlp", config=setting(norm_topk_prob=True)),
    Mutant("qwen2_moe_shared_gate_up_swapped", "qwen2_moe", "gate taken for up in the shared expert", "layers.2.mlp",
           tensors=swap(M2 + "shared_expert.gate_proj.weight", M2 + "shared_expert.up_proj.weight")),
    Mutant("qwen3_moe_probabilities_not_normalised", "qwen3_moe",
           "probabilities of the chosen experts not normalised: softmax before top-k", "layers.0.mlp",
           config=setting(norm_topk_prob=False)),
    Mutant("qwen3_moe_router_rows", "qwen3_moe", "router rows of one layer off by one", "layers.2.mlp",
           tensors=change(M2 + "gate.weight", rolled)),
    Mutant("qwen3_moe_two_experts_swapped", "qwen3_moe", "up_proj of two experts of one layer change places",
           "layers.2.mlp", tensors=swap(M2 + "experts.2.up_proj.weight", M2 + "experts.5.up_proj.weight")),
    Mutant("qwen3_moe_top_3", "qwen3_moe", "three experts a token for four", "layers.0.mlp",
           config=setting(num_experts_per_tok=3)),
    Mutant("olmoe_probabilities_normalised", "olmoe", "probabilities of the chosen experts normalised",
           "layers.0.mlp", config=setting(norm_topk_prob=True)),
    Mutant("olmoe_qk_norms_swapped", "olmoe", "q_norm taken for k_norm", "layers.0.attention",
           rows=wrong.with_hf_names_swapped("q_norm", "k_norm")),
    Mutant("gpt_oss_gate_up_by_half", "gpt_oss", "rows of gate and up taken for halves, not for even and odd",
           "layers.0.mlp", rows=wrong.with_class(Copy, "linear_fc1.weight")),
    Mutant("gpt_oss_down_proj_transposed", "gpt_oss", "square down_proj of one layer's experts transposed",
           "layers.2.mlp", tensors=change(M2 + "experts.down_proj", _square_transposed)),
    Mutant("gpt_oss_sinks_dropped", "gpt_oss", "sinks left at their initial zeros", "layers.0.attention",
           tensors=change_each("sinks", zero)),
    Mutant("gpt_oss_sinks_rotated", "gpt_oss", "sinks of one layer one head on", "layers.2.attention",
           tensors=change(L2 + "self_attn.sinks", rolled)),
    Mutant("gpt_oss_clamp", "gpt_oss", "activations clamped at 7 whatever the config says", "layers.0.mlp",
           config=setting(swiglu_limit=7.0)),
    Mutant("gpt_oss_router_bias_dropped", "gpt_oss", "router bias of one layer left at its initial zeros",
           "layers.2.mlp", tensors=change(M2 + "router.bias", zero)),
    Mutant("gpt_oss_experts_rotated", "gpt_oss", "stacked experts of one layer one place on", "layers.2.mlp",
           tensors=_experts_rotated),
    Mutant("gpt_oss_expert_bias_dropped", "gpt_oss", "biases of the experts' down_proj left at their initial zeros",
           "layers.0.mlp", tensors=change_each("experts.down_proj_bias", zero)),
    Mutant("gpt_oss_windows_on_other_layers", "gpt_oss", "windows on odd layers, not even ones", "layers.0.attention",
           config=_windows_on_the_other_layers),
    Mutant("gpt_oss_yarn_truncated", "gpt_oss", "YaRN's range rounded to whole dimensions", "layers.0.attention",
           config=set_rope(truncate=True)),
    Mutant("gpt_oss_yarn_dropped", "gpt_oss", "YaRN overlooked", "layers.0.attention", config=plain_rope),
)
# fmt: on
