"""Attention of the torch backend: causal, with windows, capped scores and sinks where a model has them.

S queries, T keys, B batch, N query heads of this rank, G query groups of this rank, R query heads a group, D head size
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from mcore.backend.context import gather, queries_and_keys
from mcore.backend.packed import PackedSamples


class SDPAttention(torch.nn.Module):
    """Causal attention in megatron-core's place for it (`core_attention`): torch's fused kernel wherever it can.

    Capped scores and sinks are no part of that kernel. There the scores of all pairs are computed and held, with the
    softmax in fp32, as transformers' eager attention does.

    Packed samples are computed one after the other: on a CPU that takes less time than a mask of all pairs, and than
    padding them to one length (`docs/decisions/0082`), and no more memory than one sample.

    With context parallelism each rank has its own tokens' queries, and gathers the keys and values of all.

    Args:
        config: Of the model; its `softmax_type` `learnable` gives each query head a sink.
        layer_number: Number of the layer in the whole decoder, from 1.
        softmax_scale: Factor on the scores; None for 1 / sqrt(D).
        windows: Tokens that each layer attends to, the token itself included; None for all before. Empty: all for all.
        softcap: Scores go through `softcap * tanh(score / softcap)`.
        pg_collection: Its context parallel group (`cp`) are the ranks that share samples; None for no others.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int = 1,
        softmax_scale: float | None = None,
        *,
        windows: Sequence[int | None] = (),
        softcap: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_unused: Any,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.window = windows[layer_number - 1] if windows else None
        self.softcap = softcap
        self.dropout = config.attention_dropout
        self.cp_group = None if pg_collection is None or pg_collection.cp.size() == 1 else pg_collection.cp
        self.softmax_offset: torch.nn.Parameter | None = None  # megatron's name of the sinks
        if config.softmax_type == "learnable":
            num_heads = config.num_attention_heads // parallel_state.get_tensor_model_parallel_world_size()
            device = torch.cuda.current_device()
            self.softmax_offset = torch.nn.Parameter(torch.zeros(num_heads, dtype=config.params_dtype, device=device))
            set_tensor_model_parallel_attributes(self.softmax_offset, is_parallel=True, dim=0, stride=1)

    def forward(
        self,
        query_SBND: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSamples | None = None,
    ) -> Tensor:
        """Attention's output, `[S, B, N * D]`; of packed samples, whose tensors have no B, `[S, N * D]`."""
        assert attention_mask is None and attention_bias is None, "this attention is causal and takes no other mask"
        tensors = [query_SBND, key_SBGD, value_SBGD]
        if packed_seq_params is not None:
            tensors = [x.unsqueeze(1) for x in tensors]
        size = 1 if self.cp_group is None else self.cp_group.size()
        lengths = (len(query_SBND) * size,) if packed_seq_params is None else packed_seq_params.lengths
        if self.cp_group is not None:
            tensors[1:] = gather(tensors[1:], lengths, self.cp_group)
        shares = [length // size for length in lengths]
        of_samples = zip(
            torch.split(tensors[0], shares), *(torch.split(x, list(lengths)) for x in tensors[1:]), strict=True
        )
        output_SBH = torch.cat([self._sample(*of_sample) for of_sample in of_samples])
        return output_SBH if packed_seq_params is None else output_SBH.squeeze(1)

    def _sample(self, query_SBND: Tensor, key_TBGD: Tensor, value_TBGD: Tensor) -> Tensor:
        """Of one sample, this rank's queries over all keys."""
        if self.cp_group is None:
            return self._last_of(query_SBND, key_TBGD, value_TBGD)
        chunks = []
        for queries, end in queries_and_keys(len(key_TBGD), self.cp_group.size(), self.cp_group.rank()):
            num_queries = queries.stop - queries.start
            start = 0 if self.window is None else max(0, end - num_queries + 1 - self.window)
            chunks.append(self._last_of(query_SBND[queries], key_TBGD[start:end], value_TBGD[start:end]))
        return torch.cat(chunks)

    def _last_of(self, query_SBND: Tensor, key_TBGD: Tensor, value_TBGD: Tensor) -> Tensor:
        """Of tokens with the given keys, the last S have the queries."""
        query_BNSD, key_BGTD, value_BGTD = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_TBGD, value_TBGD))
        attend = self._fused if self.softcap is None and self.softmax_offset is None else self._explicit
        return attend(query_BNSD, key_BGTD, value_BGTD).permute(2, 0, 1, 3).flatten(2)

    def _fused(self, query_BNSD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor) -> Tensor:
        num_queries, num_keys = query_BNSD.shape[2], key_BGTD.shape[2]
        # The kernel's own causal mask has the first query at the first key.
        needs_mask = num_queries < num_keys or (self.window is not None and self.window < num_keys)
        return F.scaled_dot_product_attention(
            query_BNSD,
            key_BGTD,
            value_BGTD,
            attn_mask=self._may_attend(num_queries, num_keys, query_BNSD.device) if needs_mask else None,
            is_causal=not needs_mask,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.softmax_scale,
            enable_gqa=query_BNSD.shape[1] != key_BGTD.shape[1],
        )

    def _explicit(self, query_BNSD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor) -> Tensor:
        batch, num_groups, num_keys, _ = key_BGTD.shape
        query_BGRSD = query_BNSD.reshape(batch, num_groups, -1, *query_BNSD.shape[2:])
        scale = query_BNSD.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale
        scores_BGRST = query_BGRSD @ key_BGTD.unsqueeze(2).transpose(-1, -2) * scale
        if self.softcap is not None:
            scores_BGRST = torch.tanh(scores_BGRST / self.softcap) * self.softcap
        may_attend_ST = self._may_attend(query_BNSD.shape[2], num_keys, query_BNSD.device)
        scores_BGRST = scores_BGRST.float().masked_fill(~may_attend_ST, -torch.inf)
        if self.softmax_offset is not None:
            sink_BGRS1 = (
                self.softmax_offset.float().view(*query_BGRSD.shape[1:3], 1, 1).expand_as(scores_BGRST[..., :1])
            )
            scores_BGRST = torch.cat([scores_BGRST, sink_BGRS1], dim=-1)
        shares_BGRST = scores_BGRST.softmax(-1)[..., :num_keys].to(query_BNSD.dtype)
        shares_BGRST = F.dropout(shares_BGRST, self.dropout, self.training)
        return (shares_BGRST @ value_BGTD.unsqueeze(2)).flatten(1, 2)

    def _may_attend(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        """Whether a token attends to another, `[S, T]`: no later one, and none that the window has left behind."""
        before = num_keys - num_queries  # keys that the first query follows
        before_ST = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(before)
        return before_ST if self.window is None else before_ST.triu(before + 1 - self.window)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """The sinks for a checkpoint, if there are any, divided over the TP ranks as the heads are."""
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )
        return sharded
