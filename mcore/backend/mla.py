"""Multi-latent attention (MLA, the DeepSeek models'): query, key and value come out of small latents.

megatron-core's module computes it. What it gets from here: frequencies that transformers computed, the latent norms'
own epsilon, and a right gradient of the keys' rotary part under tensor parallelism.

Legend: S sequence, B batch, R rank of a latent, D size of the rotary part of a head
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache, partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings import YarnRotaryEmbedding
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from mcore.backend.context import part_of_rank
from mcore.backend.rope import ReferenceRope, RopeTable
from mcore.errors import ConfigError, Problem

LATENT_NORM_EPSILON = 1e-6
"""transformers builds both latent norms with its default, whatever the config's `rms_norm_eps` (Moonlight's is 1e-5).

Source: transformers 5.19 `modeling_deepseek_v3.py`."""

FIRST_ROTARY_LENGTH = 4096
"""Positions of the table that megatron-core computes before it knows a length, for each context parallel rank."""

CHECKPOINT_KEYS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}
"""A checkpoint names a latent's norm as Transformer Engine does, which has it in the layer that it goes into."""

if importlib.util.find_spec("transformer_engine") is None:
    # 0.16.1 takes its own stand-in for Transformer Engine for the package, and asks whether layers are of its classes.
    multi_latent_attention.HAVE_TE = False


def latent_attention(*, norm: ModuleSpec, core_attention: partial[Any], output_linear: ModuleSpec) -> ModuleSpec:
    """Spec of the attention of backend `torch`.

    Args:
        norm: Norm of the latents.
        core_attention: Attention of given queries, keys and values.
        output_linear: The last linear layer.
    """
    submodules = MLASelfAttentionSubmodules(
        linear_q_proj=ColumnParallelLinear,
        linear_q_down_proj=ColumnParallelLinear,
        linear_q_up_proj=ColumnParallelLinear,
        linear_kv_down_proj=ColumnParallelLinear,
        linear_kv_up_proj=ColumnParallelLinear,
        # Here megatron-core asks for a spec, where it calls what its plain attention is given.
        core_attention=ModuleSpec(module=core_attention.func, params=core_attention.keywords),
        linear_proj=output_linear,
        q_layernorm=norm,
        kv_layernorm=norm,
    )
    return ModuleSpec(module=LatentAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=submodules)


class LatentAttention(MLASelfAttention):  # type: ignore[misc]
    """MLA whose down projections are divided over tensor parallel ranks, with gradients that add up.

    Ranks gather the latents. megatron-core takes the gathered key part apart as if every rank used all of it, yet each
    uses it for its own heads only: in backward a rank would keep its own heads' share of the gradient (seen in 0.16.1).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.config.sequence_parallel:  # without it megatron-core does not train layers with experts
            self.linear_kv_down_proj.register_forward_hook(self._gather)

    def _gather(
        self, layer: torch.nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """The whole latent and rotary key of this rank's part of the sequence, `[S, B, R + D]`.

        megatron-core then gathers the rotary key along the sequence, and in backward that sums over the ranks.
        """
        return scatter_to_sequence_parallel_region(gather_from_tensor_model_parallel_region(output[0])), output[1]


class LatentRotary(YarnRotaryEmbedding):  # type: ignore[misc]
    """Rotary embedding of the reference model: its frequencies, and its factor on cosine and sine.

    In megatron-core's MLA only a YaRN embedding has such a factor and a fused kernel; here it stands for every kind.
    """

    def __init__(self, table: RopeTable) -> None:
        # First, as the base class computes a first table with them.
        self.frequencies = table.inverse_frequencies.detach().to(torch.cuda.current_device())
        self.factor = table.attention_factor
        group = parallel_state.get_context_parallel_group(check_initialized=False)
        length = FIRST_ROTARY_LENGTH * (1 if group is None else group.size())
        super().__init__(kv_channels=2 * len(self.frequencies), original_max_position_embeddings=length)

    def get_emb(self, max_seq_len: int, offset: int = 0) -> tuple[Tensor, float]:
        """Angles of positions from `offset` on, `[S, 1, 1, D]`, and the factor."""
        positions_S = torch.arange(max_seq_len, device=self.frequencies.device, dtype=torch.float32) + offset
        angles_SD = torch.outer(positions_S, self.frequencies).repeat(1, 2)
        return angles_SD[:, None, None, :], self.factor

    @lru_cache(maxsize=32)  # noqa: B019 - as the base class has it, which clears the cache
    def forward(
        self,
        max_seq_len: int,
        offset: int = 0,
        packed_seq: bool = False,
        cp_group: torch.distributed.ProcessGroup | None = None,
    ) -> tuple[Tensor, float]:
        """Angles and factor, of this context parallel rank unless sequences are packed."""
        angles_S11D, factor = self.get_emb(max_seq_len, offset)
        return angles_S11D if packed_seq else part_of_rank(angles_S11D, cp_group or self.cp_group), factor


def finish_latent_attention(model: torch.nn.Module, rope: ReferenceRope) -> None:
    """Give every MLA of a model, of either backend, its rotary embedding and its latent norms' epsilon.

    Args:
        model: As built.
        rope: The reference model's.

    Raises:
        ConfigError: Frequencies depend on the sequence's length.
    """
    if rope.depends_on_length:
        problem = Problem("config.json: rope type", "one whose frequencies are the same at every length", "another")
        raise ConfigError("the model's rotary embedding can't be built for latents", [problem])
    rotary = LatentRotary(rope.tables(1)[0])
    for attention in model.modules():
        if isinstance(attention, MLASelfAttention):
            attention.rotary_pos_emb = rotary
            config = attention.config
            # The fused kernel's blocks are as wide as parts of a head, and Triton's are powers of two. Its table is cut
            # to the length at hand, which takes the wrong positions of one that context parallel ranks have divided.
            fits = all(size & (size - 1) == 0 for size in (config.qk_head_dim, config.v_head_dim))
            fits = fits and config.context_parallel_size == 1
            config.apply_rope_fusion = config.apply_rope_fusion and fits
            for name in ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj"):
                layer: Any = getattr(attention, name, None)
                if hasattr(layer, "eps"):  # the norm, or Transformer Engine's layer that it is part of
                    layer.eps = LATENT_NORM_EPSILON
