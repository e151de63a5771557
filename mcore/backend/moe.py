"""Layers with experts: what megatron-core builds a mixture of experts from, in both backends.

`transformer_engine` multiplies all experts of a rank at once; `torch` takes them one by one. Both give the same names
and shapes in a checkpoint.

S sequence, B batch, T tokens (S * B), H hidden, E experts
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mcore.backend.balancing import BalancedRouter


def moe_layer_spec(
    dense_layer: ModuleSpec, config: TransformerConfig, backend: Literal["torch", "transformer_engine"]
) -> ModuleSpec:
    """A decoder layer with experts, made of the spec of a dense one.

    The norm in front of the experts is a layer of its own and has a key of its own in checkpoints: experts and router
    both need its output, so Transformer Engine can't make it part of the first matrix as in a dense layer.
    """
    engine = backend == "transformer_engine"
    experts = get_moe_module_spec(
        use_te=engine, num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm
    )
    keys = dense_layer.submodules.sharded_state_dict_keys_map
    submodules = replace(
        dense_layer.submodules,
        mlp=experts,
        sharded_state_dict_keys_map={key: to for key, to in keys.items() if not key.startswith("pre_mlp_layernorm.")},
    )
    if engine:
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        submodules.pre_mlp_layernorm = TESpecProvider().layer_norm()
        experts.submodules.router = BalancedRouter
    else:
        experts.submodules.router = Router
        experts.submodules.experts.submodules.linear_fc2 = ExpertOutputLinear
    return replace(dense_layer, submodules=submodules)


def moe_arguments(backend: Literal["torch", "transformer_engine"]) -> dict[str, Any]:
    """Arguments of `TransformerConfig` for any model with experts: how tokens reach them, and in what precision."""
    return {
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": backend == "transformer_engine",
        "moe_router_dtype": "fp32",
        # Training says what balances the experts; it changes none of what a model computes.
        "moe_router_load_balancing_type": "none",
    }


class Router(BalancedRouter):
    """Router whose logits are computed by torch, in fp32.

    megatron-core's own calls a kernel of Transformer Engine, by a name that it leaves undefined where the package is
    missing; where it is there, that kernel rounds fp32 to TF32.
    """

    def gating(self, input: Tensor) -> Tensor:
        """Logits `[S, B, E]` of hidden states `[S, B, H]`."""
        bias_E = None if self.bias is None else self.bias.float()
        return F.linear(input.float(), self.weight.float(), bias_E)


class ExpertOutputLinear(RowParallelLinear):  # type: ignore[misc]
    """The last linear layer of an expert.

    megatron-core adds an expert's bias in place. Autograd forbids that on a tensor that a communication function has
    passed on as it is, as here where no ranks share an expert.

    And with sequence parallelism megatron-core sums the bias' gradient over the TP group, where ranks hold the same
    expert and have summed it already, and leaves all of it but one rank's part out of the gradient's norm.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.bias is not None:
            self.bias.sequence_parallel = False
            self.bias.tensor_model_parallel = True  # counts in the norm on every rank, as the weight does

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Output `[T, H]` and the bias that is still to be added."""
        output, bias = super().forward(input_)
        return (output if bias is None else output.clone()), bias


def quick_gelu(gate: Tensor) -> Tensor:
    """GELU by a sigmoid, of the same shape. megatron-core's own is compiled on its first call, and again for shapes."""
    return gate * torch.sigmoid(1.702 * gate)
