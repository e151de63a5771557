"""From samples to the micro-batches of one rank. The split never changes the loss, only how much padding is computed.

Shape suffixes: B micro-batch, S sequence, T trained tokens of the micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mcore.backend.packed import PackedSamples, positions_in_samples
from mcore.backend.parallel import to_device
from mcore.data.template import Sample
from mcore.train.packing import pack, rows_of_rank


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward pass of one rank reads.

    `trained_places_T` are the places, in sequence-first order (`s * B + b`), from which a trained token is predicted;
    `labels_1T` are those tokens, and `weights_1T` what their losses are multiplied with (None where all count alike).
    `padding_BS` is true where there is no token. With packing there is one row, and
    `samples` says where in it each begins.
    """

    tokens_BS: Tensor
    position_ids_BS: Tensor
    padding_BS: Tensor
    trained_places_T: Tensor
    labels_1T: Tensor
    samples: PackedSamples | None = None
    weights_1T: Tensor | None = None


def num_tokens(sample: Sample) -> float:
    """Those that the model reads."""
    return len(sample.token_ids) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """How the samples of a step are divided over data parallel ranks and micro-batches.

    Attributes:
        micro_batch_size: Samples of one forward pass, or rows that are packed as one.
        data_parallel_size: Ranks that share a step's samples.
        data_parallel_rank: This process among them.
        same_length: Whether all micro-batches of a step have one length, as pipeline stages expect of each other.
        length_multiple: Tokens: lengths are rounded up to a multiple of this.
        count_multiple: Micro-batches of a step are made a multiple of this.
        packing_length: Tokens of a row that samples are packed into, end to end; None to pad them instead.
        sample_multiple: Tokens: packed samples are padded to a multiple of this each.
        cost: What a sample takes to compute, in any unit: packed ones are dealt out by it.
    """

    micro_batch_size: int
    data_parallel_size: int = 1
    data_parallel_rank: int = 0
    same_length: bool = False
    length_multiple: int = 1
    count_multiple: int = 1
    packing_length: int | None = None
    sample_multiple: int = 1
    cost: Callable[[Sample], float] = num_tokens

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
        if self.packing_length is not None:
            return self._packed(samples, device)
        lengths = [len(sample.token_ids) for sample in samples]
        longest = max(lengths)
        empty = Sample(token_ids=[], loss_mask=[])
        batches = []
        for places in self.split(lengths):
            chosen = [samples[place] if place < len(samples) else empty for place in places]
            length = longest if self.same_length else max(len(sample.token_ids) for sample in chosen)
            batches.append(_pad(chosen, self._rounded(length - 1), device))
        return batches

    def describe(self, samples: Sequence[Sample]) -> str:
        """How many rows the samples of a step fill, and how full they are."""
        rows = self._rows_of_ranks(samples)
        places = sum(length for _, length in rows)
        tokens = sum(len(sample.token_ids) - 1 for sample in samples)
        most = max(length for _, length in rows)
        return f"{len(rows)} rows of up to {most} tokens, {tokens / places:.1%} full"

    def _packed(self, samples: Sequence[Sample], device: torch.device) -> list[MicroBatch]:
        rows = self._rows_of_ranks(samples)
        first = self.data_parallel_rank * len(rows) // self.data_parallel_size
        mine = rows[first : first + len(rows) // self.data_parallel_size]
        longest = max(self._size(sample) for sample in samples)
        return [
            _row([(samples[place], self._size(samples[place])) for place in places], length, longest, device)
            for places, length in mine
        ]

    def _rows_of_ranks(self, samples: Sequence[Sample]) -> list[tuple[list[int], int]]:
        """Places of the samples of each row, and the row's length: all rows of the first rank, of the second, ..."""
        assert self.packing_length is not None
        sizes = [self._size(sample) for sample in samples]
        costs = [self.cost(sample) for sample in samples]
        capacity = max(self.micro_batch_size * self.packing_length, *sizes)
        rows = pack(sizes, costs, capacity, self.data_parallel_size * self.count_multiple)
        found = []
        for rank in range(self.data_parallel_size):
            of_rank = rows_of_rank(rows, costs, self.data_parallel_size, rank)
            used = [sum(sizes[place] for place in row) for row in of_rank]
            lengths = [self._rounded(max(used) if self.same_length else length) for length in used]
            found += list(zip(of_rank, lengths, strict=True))
        return found

    def _size(self, sample: Sample) -> int:
        return _up(max(1, len(sample.token_ids) - 1), self.sample_multiple)

    def _rounded(self, length: int) -> int:
        return _up(max(1, length), math.lcm(self.length_multiple, self.sample_multiple))


def _up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


def _row(chosen: Sequence[tuple[Sample, int]], length: int, longest: int, device: torch.device) -> MicroBatch:
    """Samples end to end, each with as many places as it says."""
    sizes = [size for _, size in chosen]
    rest = length - sum(sizes)
    # Attention goes over padding too: in pieces that cost no more than a sample.
    sizes += [min(longest, rest - start) for start in range(0, rest, longest)]
    ids_S, labels_S = (torch.zeros(length, dtype=torch.int64) for _ in range(2))
    is_token_S, weights_S = torch.zeros(length, dtype=torch.bool), torch.zeros(length)
    start = 0
    for sample, size in chosen:
        places = slice(start, start + len(sample.token_ids) - 1)
        sample_ids = torch.as_tensor(sample.token_ids, dtype=torch.int64)
        ids_S[places], labels_S[places], is_token_S[places] = sample_ids[:-1], sample_ids[1:], True
        weights_S[places] = torch.as_tensor(sample.loss_mask, dtype=torch.float32)[1:]
        start += size
    places_T = weights_S.nonzero().squeeze(1)
    return MicroBatch(
        tokens_BS=to_device(ids_S[None], device),
        position_ids_BS=to_device(positions_in_samples(sizes)[None], device),
        padding_BS=to_device(~is_token_S[None], device),
        trained_places_T=to_device(places_T, device),
        labels_1T=to_device(labels_S[places_T][None], device),
        samples=PackedSamples.of(sizes, device),
        weights_1T=_weights(weights_S[places_T], device),
    )


def _pad(samples: Sequence[Sample], length: int, device: torch.device) -> MicroBatch:
    # Padding stands behind the sample, where causal attention keeps it from reaching any real token.
    ids_BS = torch.zeros(len(samples), length + 1, dtype=torch.int64)
    weights_BS = torch.zeros(len(samples), length + 1)
    is_token_BS = torch.zeros(len(samples), length, dtype=torch.bool)
    for row, sample in enumerate(samples):
        is_token_BS[row, : max(0, len(sample.token_ids) - 1)] = True
        ids_BS[row, : len(sample.token_ids)] = torch.as_tensor(sample.token_ids, dtype=torch.int64)
        weights_BS[row, : len(sample.loss_mask)] = torch.as_tensor(sample.loss_mask, dtype=torch.float32)
    weights_T = weights_BS[:, 1:].t().flatten()
    places_T = weights_T.nonzero().squeeze(1)
    labels_T = ids_BS[:, 1:].t().flatten()[places_T]
    return MicroBatch(
        tokens_BS=to_device(ids_BS[:, :-1], device),
        position_ids_BS=to_device(torch.arange(length).expand(len(samples), length), device),
        padding_BS=to_device(~is_token_BS, device),
        trained_places_T=to_device(places_T, device),
        labels_1T=to_device(labels_T[None], device),
        weights_1T=_weights(weights_T[places_T], device),
    )


def _weights(weights_T: Tensor, device: torch.device) -> Tensor | None:
    return None if bool((weights_T == 1).all()) else to_device(weights_T[None], device)
