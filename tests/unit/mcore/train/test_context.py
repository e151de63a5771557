"""What each context parallel rank reads of a micro-batch."""

from __future__ import annotations

import pytest
import torch

from mcore.backend.layout import Layout
from mcore.data.template import Sample
from mcore.train.batches import Batching, MicroBatch
from mcore.train.context import length_multiples, part_of_batch

CPU = torch.device("cpu")
LENGTHS = (9, 14, 6, 21)


def samples() -> list[Sample]:
    """Every token is another one; the first is a prompt, and then each third is. The others have weights."""
    ids = torch.arange(1, sum(LENGTHS) + 1).split(list(LENGTHS))
    return [
        Sample(token_ids=of_sample.tolist(), loss_mask=[place % 3 / 2 for place in range(len(of_sample))])
        for of_sample in ids
    ]


def predictions(batch: MicroBatch) -> set[tuple[int, int, float]]:
    """Token at each trained place, what it is trained to predict, and the weight of that."""
    from_T = batch.tokens_BS.t().flatten()[batch.trained_places_T]
    return set(zip(from_T.tolist(), batch.labels_1T[0].tolist(), batch.weights_1T[0].tolist(), strict=True))


def micro_batches(packing_length: int | None, layout: Layout) -> list[MicroBatch]:
    of_row, of_sample = length_multiples(layout)
    batching = Batching(
        micro_batch_size=2, length_multiple=of_row, sample_multiple=of_sample, packing_length=packing_length
    )
    return batching.micro_batches(samples(), CPU)


@pytest.mark.parametrize("packing_length", [None, 24])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_train_every_token_once_on_the_next_of_its_sample(packing_length: int | None, size: int) -> None:
    found = []
    for batch in micro_batches(packing_length, Layout(context_parallel_size=size)):
        parts = [part_of_batch(batch, size, rank) for rank in range(size)]
        for part in parts:
            assert part.tokens_BS.shape == part.position_ids_BS.shape == part.padding_BS.shape
            assert part.tokens_BS.numel() * size == batch.tokens_BS.numel()
            if part.samples is not None:
                assert part.samples.lengths == batch.samples.lengths
                assert torch.equal(part.samples.cu_seqlens_q_padded, batch.samples.cu_seqlens_q)
            assert (part.tokens_BS[~part.padding_BS] > 0).all()
            found += predictions(part)
        whole = torch.stack([batch.tokens_BS, batch.position_ids_BS]).flatten(1).sort(stable=True).values
        together = torch.cat([torch.stack([part.tokens_BS, part.position_ids_BS]).flatten(1) for part in parts], dim=1)
        assert torch.equal(together.sort(stable=True).values, whole)
    expected = [
        (sample.token_ids[place - 1], sample.token_ids[place], sample.loss_mask[place])
        for sample in samples()
        for place in range(1, len(sample.token_ids))
        if sample.loss_mask[place]
    ]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("packing_length", [None, 24])
def test_lengths_divide_over_context_and_tensor_parallel_ranks(packing_length: int | None) -> None:
    layout = Layout(context_parallel_size=2, tensor_model_parallel_size=4, sequence_parallel=True)
    for batch in micro_batches(packing_length, layout):
        assert batch.tokens_BS.shape[1] % 8 == 0
        if batch.samples is not None:
            assert all(length % 4 == 0 for length in batch.samples.lengths)


def test_one_process_reads_the_batch_as_it_is() -> None:
    assert length_multiples(Layout()) == (1, 1)
    (batch, *_) = micro_batches(None, Layout())
    assert part_of_batch(batch, 1, 0) is batch
