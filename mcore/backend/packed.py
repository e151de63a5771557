"""Samples laid end to end in one row, and where each begins: what attention and rotary embedding must know of packing.

Shape suffix: S tokens of the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from mcore.backend.parallel import to_device


@dataclass
class PackedSamples(PackedSeqParams):  # type: ignore[misc]
    """The samples of a row, as megatron-core and Transformer Engine take them, and their lengths as plain numbers.

    Padding is samples of its own, or part of one behind its last token, where causal attention keeps it from reaching
    any other. So no second list of lengths without padding is needed, which Transformer Engine would also take.

    Attributes:
        lengths: Tokens of each sample, in the order of the row; together all of it.
    """

    lengths: tuple[int, ...] = ()

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Self:
        """Samples of these lengths, with their bounds on a device."""
        bounds = to_device(torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32), device)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
            lengths=tuple(lengths),
        )


def positions_in_samples(lengths: Sequence[int]) -> Tensor:
    """Each token's place in its own sample, `[S]`, on the CPU."""
    return torch.cat([torch.arange(length, device="cpu") for length in lengths])
