"""From samples to the micro-batches of one rank. The split never changes the loss, only how much padding is computed.

Shape suffixes: B micro-batch, S sequence, T trained tokens of the micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mcore.data.template import Sample


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward pass of one rank reads.

    `trained_places_T` are the places, in sequence-first order (`s * B + b`), from which a trained token is predicted;
    `labels_1T` are those tokens. `padding_BS` is true where there is no token.
    """

    tokens_BS: Tensor
    position_ids_BS: Tensor
    padding_BS: Tensor
    trained_places_T: Tensor
    labels_1T: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """How the samples of a step are divided over data parallel ranks and micro-batches.

    Attributes:
        micro_batch_size: Samples of one forward pass.
        data_parallel_size: Ranks that share a step's samples.
        data_parallel_rank: This process among them.
        same_length: Whether all micro-batches of a step have one length, as pipeline stages expect of each other.
        length_multiple: Tokens: lengths are rounded up to a multiple of this.
        count_multiple: Micro-batches of a step are made a multiple of this.
    """

    micro_batch_size: int
    data_parallel_size: int = 1
    data_parallel_rank: int = 0
    same_length: bool = False
    length_multiple: int = 1
    count_multiple: int = 1

    def split(self, lengths: Sequence[int]) -> list[list[int]]:
        """Places of this rank's samples, a list a micro-batch.

        Samples of like length go together, the longest first (if memory is short, it shows at once). All ranks compute
        samples of like length at the same time. A place of `len(lengths)` or more is an empty sample that fills up.
        """
        # The loss is a mean over all tokens of the step, so the order inside it is free.
        by_length = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
        round_size = self.micro_batch_size * self.data_parallel_size
        num_rounds = math.ceil(len(by_length) / round_size / self.count_multiple) * self.count_multiple
        by_length += range(len(by_length), num_rounds * round_size)
        mine = self.data_parallel_rank * self.micro_batch_size
        return [
            by_length[start + mine : start + mine + self.micro_batch_size]
            for start in range(0, len(by_length), round_size)
        ]

    def micro_batches(self, samples: Sequence[Sample], device: torch.device) -> list[MicroBatch]:
        """This rank's micro-batches of a step.

        Args:
            samples: All samples of the step over all ranks, at least one.
            device: Where the tensors go.
        """
        lengths = [len(sample.token_ids) for sample in samples]
        longest = max(lengths)
        empty = Sample(token_ids=[], loss_mask=[])
        batches = []
        for places in self.split(lengths):
            chosen = [samples[place] if place < len(samples) else empty for place in places]
            length = longest if self.same_length else max(len(sample.token_ids) for sample in chosen)
            batches.append(_pad(chosen, self._rounded(length - 1), device))
        return batches

    def _rounded(self, length: int) -> int:
        return max(1, math.ceil(length / self.length_multiple)) * self.length_multiple


def _pad(samples: Sequence[Sample], length: int, device: torch.device) -> MicroBatch:
    # Padding stands behind the sample, where causal attention keeps it from reaching any real token.
    ids_BS = torch.zeros(len(samples), length + 1, dtype=torch.int64)
    trained_BS = torch.zeros(len(samples), length + 1, dtype=torch.bool)
    is_token_BS = torch.zeros(len(samples), length, dtype=torch.bool)
    for row, sample in enumerate(samples):
        is_token_BS[row, : max(0, len(sample.token_ids) - 1)] = True
        ids_BS[row, : len(sample.token_ids)] = torch.as_tensor(sample.token_ids, dtype=torch.int64)
        trained_BS[row, : len(sample.loss_mask)] = torch.as_tensor(sample.loss_mask, dtype=torch.bool)
    places_T = trained_BS[:, 1:].t().flatten().nonzero().squeeze(1)
    labels_T = ids_BS[:, 1:].t().flatten()[places_T]
    return MicroBatch(
        tokens_BS=ids_BS[:, :-1].to(device),
        position_ids_BS=torch.arange(length).expand(len(samples), length).to(device),
        padding_BS=~is_token_BS.to(device),
        trained_places_T=places_T.to(device),
        labels_1T=labels_T[None].to(device),
    )
