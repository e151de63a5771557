from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from mcore.data.template import Sample
from mcore.train.batches import Batching

CPU = torch.device("cpu")


def sample(length: int, first: int = 1) -> Sample:
    ids = list(range(first, first + length))
    return Sample(ids, [False] * (length // 2) + [True] * (length - length // 2), f"row {first}")


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=30),
    micro_batch_size=st.integers(1, 4),
    data_parallel_size=st.integers(1, 4),
)
def test_every_sample_is_computed_once_over_all_ranks(
    lengths: list[int], micro_batch_size: int, data_parallel_size: int
) -> None:
    places = []
    num_micro_batches = set()
    for rank in range(data_parallel_size):
        batching = Batching(
            micro_batch_size=micro_batch_size, data_parallel_size=data_parallel_size, data_parallel_rank=rank
        )
        split = batching.split(lengths)
        assert all(len(micro_batch) == micro_batch_size for micro_batch in split)
        num_micro_batches.add(len(split))
        places += [place for micro_batch in split for place in micro_batch]
    assert len(num_micro_batches) == 1  # or a collective would wait forever
    assert sorted(place for place in places if place < len(lengths)) == list(range(len(lengths)))
    assert len(places) - len(lengths) < micro_batch_size * data_parallel_size


def test_samples_of_like_length_meet_on_all_ranks_at_once() -> None:
    lengths = [5, 40, 7, 38, 6, 39, 8, 41]
    ranks = [Batching(micro_batch_size=2, data_parallel_size=2, data_parallel_rank=rank) for rank in (0, 1)]
    assert [[lengths[place] for place in micro_batch] for micro_batch in ranks[0].split(lengths)] == [[41, 40], [8, 7]]
    assert [[lengths[place] for place in micro_batch] for micro_batch in ranks[1].split(lengths)] == [[39, 38], [6, 5]]


def test_labels_are_the_next_tokens_and_padding_is_never_trained() -> None:
    (batch,) = Batching(micro_batch_size=3).micro_batches([sample(4, first=10), sample(7, first=50)], CPU)
    assert batch.tokens_BS.tolist() == [[50, 51, 52, 53, 54, 55], [10, 11, 12, 13, 0, 0], [0] * 6]
    assert batch.position_ids_BS.tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    # Of [50 … 56] the last four are trained, of [10 … 13] the last two; places count sequence first, three samples.
    assert batch.labels_1T.tolist() == [[12, 53, 13, 54, 55, 56]]
    assert batch.trained_places_T.tolist() == [1 * 3 + 1, 2 * 3 + 0, 2 * 3 + 1, 3 * 3 + 0, 4 * 3 + 0, 5 * 3 + 0]


def test_padding_is_where_no_token_is() -> None:
    (batch,) = Batching(micro_batch_size=3).micro_batches([sample(4), sample(7)], CPU)
    assert batch.padding_BS.int().tolist() == [[0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1] * 6]


def test_virtual_stages_get_as_many_micro_batches_as_they_can_take_in_turns() -> None:
    samples = [sample(length) for length in (9, 8, 7, 6, 5)]
    batches = Batching(micro_batch_size=1, count_multiple=4).micro_batches(samples, CPU)
    assert [batch.labels_1T.numel() for batch in batches] == [5, 4, 4, 3, 3, 0, 0, 0]


def test_lengths_are_rounded_up_and_equal_where_they_must_be() -> None:
    samples = [sample(length) for length in (4, 9, 5, 21)]

    def lengths(**options: object) -> list[int]:
        batches = Batching(micro_batch_size=2, **options).micro_batches(samples, CPU)
        return [batch.tokens_BS.shape[1] for batch in batches]

    assert lengths() == [20, 4]
    assert lengths(same_length=True) == [20, 20]
    assert lengths(length_multiple=8) == [24, 8]
    assert lengths(length_multiple=8, same_length=True) == [24, 24]


def test_packed_samples_lie_end_to_end_and_positions_restart() -> None:
    (batch,) = Batching(micro_batch_size=1, packing_length=12).micro_batches([sample(4, 10), sample(7, 50)], CPU)
    assert batch.tokens_BS.tolist() == [[50, 51, 52, 53, 54, 55, 10, 11, 12]]
    assert batch.position_ids_BS.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2]]
    assert batch.labels_1T.tolist() == [[53, 54, 55, 56, 12, 13]]
    assert batch.trained_places_T.tolist() == [2, 3, 4, 5, 7, 8]
    assert not batch.padding_BS.any()
    assert batch.samples is not None
    assert batch.samples.lengths == (6, 3)
    assert batch.samples.cu_seqlens_q.tolist() == [0, 6, 9]


def test_padding_of_a_row_is_samples_no_longer_than_the_longest() -> None:
    batching = Batching(micro_batch_size=1, packing_length=12, length_multiple=16, sample_multiple=4)
    (batch,) = batching.micro_batches([sample(4, 10), sample(6, 50)], CPU)
    assert batch.tokens_BS.tolist() == [[50, 51, 52, 53, 54, 0, 0, 0, 10, 11, 12, 0, 0, 0, 0, 0]]
    assert batch.padding_BS.int().tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1]]
    assert batch.position_ids_BS.tolist() == [[*range(8), *range(4), *range(4)]]
    assert batch.samples is not None
    assert batch.samples.lengths == (8, 4, 4)


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=30),
    micro_batch_size=st.integers(1, 3),
    data_parallel_size=st.integers(1, 4),
    same_length=st.booleans(),
    multiples=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_packed_ranks_together_have_every_token_once(
    lengths: list[int], micro_batch_size: int, data_parallel_size: int, same_length: bool, multiples: tuple[int, int]
) -> None:
    samples = [sample(length, 1000 * number) for number, length in enumerate(lengths, start=1)]
    tokens, labels, counts = [], [], set()
    for rank in range(data_parallel_size):
        batching = Batching(
            micro_batch_size=micro_batch_size,
            data_parallel_size=data_parallel_size,
            data_parallel_rank=rank,
            same_length=same_length,
            length_multiple=multiples[0],
            sample_multiple=multiples[1],
            packing_length=40,
        )
        batches = batching.micro_batches(samples, CPU)
        counts.add(len(batches))
        if same_length:
            assert len({batch.tokens_BS.shape for batch in batches}) == 1
        for batch in batches:
            assert batch.samples is not None
            assert sum(batch.samples.lengths) == batch.tokens_BS.shape[1]
            assert batch.tokens_BS.shape[1] % multiples[0] == 0
            assert all(length % multiples[1] == 0 for length in batch.samples.lengths)
            tokens += batch.tokens_BS[~batch.padding_BS].tolist()
            labels += batch.labels_1T[0].tolist()
            assert (batch.tokens_BS[0, batch.trained_places_T] + 1 == batch.labels_1T[0]).all()
    assert len(counts) == 1
    assert sorted(tokens) == sorted(token for one in samples for token in list(one.token_ids)[:-1])
    trained = [
        token for one in samples for token, is_target in zip(one.token_ids, one.loss_mask, strict=True) if is_target
    ]
    assert sorted(labels) == sorted(token for token in trained if token % 1000)  # the first of a sample is no target


def test_a_run_says_how_full_its_rows_are() -> None:
    batching = Batching(micro_batch_size=2, data_parallel_size=2, packing_length=12, length_multiple=8)
    assert batching.describe([sample(9), sample(5), sample(4)]) == "2 rows of up to 8 tokens, 93.8% full"


def test_weights_are_those_of_the_labels_and_none_where_all_count_alike() -> None:
    samples = [
        Sample([5, 1, 2, 3, 4], [0.0, 0.0, 0.5, 1.0, 0.25], "a"),
        Sample([9, 6, 7], [0.0, 2.0, 0.0], "b"),
    ]
    of_label = {2: 0.5, 3: 1.0, 4: 0.25, 6: 2.0}
    for packing_length in (None, 8):
        (batch,) = Batching(micro_batch_size=2, packing_length=packing_length).micro_batches(samples, CPU)
        assert batch.weights_1T is not None
        assert dict(zip(batch.labels_1T[0].tolist(), batch.weights_1T[0].tolist(), strict=True)) == of_label
        (plain,) = Batching(micro_batch_size=2, packing_length=packing_length).micro_batches([sample(4)], CPU)
        assert plain.weights_1T is None
