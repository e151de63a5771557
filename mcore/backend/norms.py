"""Root mean square norms of the torch backend.

Weights are scaled as transformers scales them: Llama's norms round to the input's dtype before they scale, others
scale in fp32 and round once.

S sequence, B batch, N heads of this rank, D head size
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """Root mean square norm over the last axis, with statistics in fp32.

    megatron-core's own wrapper of torch's norm refuses sequence parallelism and zero-centred weights, and keeps its
    weight in fp32 whatever `params_dtype` is.

    Args:
        config: Gives dtype, sequence parallelism, and whether weights are zero-centred (`x * (1 + weight)`).
        hidden_size: Size of the last axis.
        eps: Added to the mean of squares.
        scale_in_fp32: Scale before rounding to the input's dtype, not after it. Zero-centred weights always do.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, *, scale_in_fp32: bool = False
    ) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centred = config.layernorm_zero_centered_gamma
        self.scale_in_fp32 = scale_in_fp32 or self.zero_centred
        self.weight = _weight(config, hidden_size)
        # Under SP each rank sees a part of the sequence; megatron sums the gradients of parameters marked so.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalised input, `[..., size]` like the input."""
        return self.scaled(F.rms_norm(hidden.float(), (hidden.shape[-1],), eps=self.eps), hidden.dtype)

    def scaled(self, normalised: Tensor, dtype: torch.dtype) -> Tensor:
        """An fp32 tensor of root mean square 1, `[..., size]`, times the weight, in `dtype`."""
        if not self.scale_in_fp32:
            return self.weight * normalised.to(dtype)
        weight = self.weight.float()
        return (normalised * (1.0 + weight if self.zero_centred else weight)).to(dtype)


class ProjectionRMSNorm(RMSNorm):
    """Root mean square norm over all heads of a query or key projection, also where TP ranks divide the heads.

    Each rank holds the weights of its own heads. megatron sums gradients of every `q_layernorm` and `k_layernorm` over
    the TP ranks if `qk_layernorm` is set, as it knows copies only: with this norm the config must not set it.

    Args:
        config: As of `RMSNorm`.
        hidden_size: Size of one head, as megatron gives it.
        eps: Added to the mean of squares.
        num_heads: Heads of the projection, over all ranks.
        scale_in_fp32: As of `RMSNorm`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        num_heads: int,
        scale_in_fp32: bool = False,
    ) -> None:
        assert not config.qk_layernorm, "megatron would add up the gradients of different heads"
        tp_size = parallel_state.get_tensor_model_parallel_world_size()
        super().__init__(config, num_heads // tp_size * hidden_size, eps, scale_in_fp32=scale_in_fp32)
        self.projection_size = num_heads * hidden_size
        self.weight.sequence_parallel = False  # type: ignore[attr-defined]
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, heads_SBND: Tensor) -> Tensor:
        """Normalised heads of this rank, `[S, B, N, D]` like the input."""
        rows = heads_SBND.flatten(2).float()
        # Every rank's output depends on every rank's squares, so their gradient is summed as they are.
        squares = reduce_from_tensor_model_parallel_region(rows.square().sum(-1, keepdim=True))
        mean = copy_to_tensor_model_parallel_region(squares) / self.projection_size
        return self.scaled(rows * torch.rsqrt(mean + self.eps), heads_SBND.dtype).view_as(heads_SBND)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """The weight for a checkpoint: whole over all ranks, divided along its only axis."""
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )
        return sharded


def _weight(config: TransformerConfig, size: int) -> torch.nn.Parameter:
    device = torch.cuda.current_device()
    return torch.nn.Parameter(torch.ones(size, dtype=config.params_dtype, device=device))
