"""Queries that grow with their position, so that attention stays sharp in long contexts (Ministral 3, after Llama 4).

S sequence, B batch, N heads, D head size
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from mcore.backend.context import part_of_rank
from mcore.backend.packed import PackedSamples
from mcore.bridge.features import QueryScale


def install_query_scale(model: GPTModel, scale: QueryScale) -> None:
    """Have every attention of a model multiply its turned queries by a factor of their position.

    A hook on the innermost part of the attention, so that it fits whatever class the layer's spec names.
    """

    def multiply(
        module: torch.nn.Module, inputs: tuple[Any, ...], options: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        query = inputs[0]  # [S, B, N, D], of packed samples [S, N, D]
        samples = options.get("packed_seq_params")
        if samples is None:
            factors_S = position_factors(query.shape[0], scale, query.device)
        else:
            factors_S = packed_factors(samples, scale, query.device)
        return (query * factors_S.view(-1, *[1] * (query.dim() - 1)).to(query.dtype), *inputs[1:]), options

    for layer in model.decoder.layers:
        layer.self_attention.core_attention.register_forward_pre_hook(multiply, with_kwargs=True)


def packed_factors(samples: PackedSamples, scale: QueryScale, device: torch.device) -> Tensor:
    """Factors `[S]`, fp32, of the tokens that this context parallel rank has of packed samples."""
    shares = (length // parallel_state.get_context_parallel_world_size() for length in samples.lengths)
    return torch.cat([position_factors(share, scale, device) for share in shares])


def position_factors(num_positions: int, scale: QueryScale, device: torch.device) -> Tensor:
    """Factors `[S]`, fp32, of the `num_positions` positions that this context parallel rank has.

    Source: transformers 5.19 `modeling_ministral3.py`, `get_llama_4_attn_scale`.
    """
    group = parallel_state.get_context_parallel_group()
    positions_S = torch.arange(num_positions * group.size(), device=device)
    factors_S = 1 + scale.beta * torch.log(1 + torch.floor(positions_S / scale.length))
    return part_of_rank(factors_S, group)
