"""Layer specs: which modules megatron-core builds its decoder from.

`torch` runs anywhere (SDPA, our norm). `transformer_engine` needs CUDA and the package. Both give the same names and
shapes in a checkpoint.

S sequence, B batch, H hidden, N query heads of this rank, G query groups of this rank, D head size
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mcore.errors import ConfigError, Problem

Backend = Literal["torch", "transformer_engine"]


def resolve_backend(backend: Literal["auto", "torch", "transformer_engine"]) -> Backend:
    """The backend that `auto` stands for on this machine; a named one is checked and given back.

    Raises:
        ConfigError: Transformer Engine is asked for, and this machine can't run it.
    """
    problems = []
    if not torch.cuda.is_available():
        problems.append(Problem("CUDA", "a device", "none"))
    if importlib.util.find_spec("transformer_engine") is None:
        problems.append(Problem("transformer_engine", "an installed package", "none"))
    if backend == "auto":
        return "torch" if problems else "transformer_engine"
    if backend == "transformer_engine" and problems:
        raise ConfigError("backend: transformer_engine can't run here", [*problems, Problem("Set backend: torch.")])
    return backend


def layer_spec(config: TransformerConfig, backend: Backend) -> ModuleSpec | TransformerBlockSubmodules:
    """What `GPTModel` builds the decoder layers of this pipeline stage from."""
    if backend == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = SDPAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)


class RMSNorm(torch.nn.Module):
    """Root mean square norm over the last axis: statistics in fp32, scaled in the input's dtype, as transformers does.

    megatron-core's own wrapper of torch's norm refuses sequence parallelism and keeps its weight in fp32 whatever
    `params_dtype` is.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        # Under SP each rank sees a part of the sequence; megatron sums the gradients of parameters marked so.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalised input, `[..., size]` like the input."""
        normalised = F.rms_norm(hidden.float(), (hidden.shape[-1],), eps=self.eps)
        return self.weight * normalised.to(hidden.dtype)


class SDPAttention(torch.nn.Module):
    """Causal attention by torch's fused kernel, in megatron-core's place for it (`core_attention`)."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_unused: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale  # None: 1 / sqrt(D), in torch as in megatron
        self.dropout = config.attention_dropout

    def forward(
        self,
        query_SBND: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attention's output, `[S, B, N * D]`."""
        assert attention_mask is None and attention_bias is None, "this attention is causal and takes no other mask"
        assert packed_seq_params is None, "packing needs backend transformer_engine"
        query_BNSD, key_BGSD, value_BGSD = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBGD, value_SBGD))
        context_BNSD = F.scaled_dot_product_attention(
            query_BNSD,
            key_BGSD,
            value_BGSD,
            is_causal=True,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.softmax_scale,
            enable_gqa=query_BNSD.shape[1] != key_BGSD.shape[1],
        )
        return context_BNSD.permute(2, 0, 1, 3).flatten(2)
