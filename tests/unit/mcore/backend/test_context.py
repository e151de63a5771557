"""The zig-zag division of samples over context parallel ranks."""

from __future__ import annotations

import pytest
import torch

from mcore.backend.context import chunks_of_rank, places_of_rank, queries_and_keys


def test_a_rank_has_a_chunk_from_the_front_and_one_from_the_back() -> None:
    assert places_of_rank((8,), 2, 0).tolist() == [0, 1, 6, 7]
    assert places_of_rank((8,), 2, 1).tolist() == [2, 3, 4, 5]


def test_each_packed_sample_is_divided_by_itself() -> None:
    assert places_of_rank((4, 8), 2, 0).tolist() == [0, 3, 4, 5, 10, 11]
    assert places_of_rank((4, 8), 2, 1).tolist() == [1, 2, 6, 7, 8, 9]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_together_have_every_token_once(size: int) -> None:
    lengths = (2 * size, 6 * size, 4 * size)
    places = torch.cat([places_of_rank(lengths, size, rank) for rank in range(size)])
    assert sorted(places.tolist()) == list(range(sum(lengths)))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_causal_attention_costs_all_ranks_alike(size: int) -> None:
    pairs = {(places_of_rank((12 * size,), size, rank) + 1).sum().item() for rank in range(size)}
    assert len(pairs) == 1


def test_queries_of_a_chunk_look_at_no_key_behind_it() -> None:
    assert list(queries_and_keys(16, 2, 0)) == [(slice(0, 4), 4), (slice(4, 8), 16)]
    assert list(queries_and_keys(16, 2, 1)) == [(slice(0, 4), 8), (slice(4, 8), 12)]


def test_lengths_that_do_not_divide_are_found_out() -> None:
    with pytest.raises(AssertionError, match="6 tokens does not divide into 4 chunks"):
        chunks_of_rank(6, 2, 0)
