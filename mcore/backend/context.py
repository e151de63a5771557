"""Context parallelism (CP): ranks that share the tokens of each sample, zig-zag.

A sample is cut into twice as many chunks as there are ranks; rank r has chunk r and the r-th from the end. So causal
attention, in which later tokens cost more, costs all ranks alike. Of packed samples each is divided by itself. It is
the division that Transformer Engine's attention expects (megatron-core 0.16.1, `get_pos_emb_on_this_cp_rank`).

Legend: S tokens of this rank, T tokens of all ranks in their own order, C tokens of a chunk
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor


def chunks_of_rank(length: int, size: int, rank: int) -> tuple[slice, slice]:
    """Places of a sample that a rank has, in the order in which it has them.

    Args:
        length: Tokens of the sample, a multiple of `2 * size`.
        size: Ranks.
        rank: One of them.
    """
    chunk, rest = divmod(length, 2 * size)
    assert rest == 0, f"a sample of {length} tokens does not divide into {2 * size} chunks"
    first, last = rank * chunk, (2 * size - 1 - rank) * chunk
    return slice(first, first + chunk), slice(last, last + chunk)


@lru_cache(maxsize=64)
def places_of_rank(lengths: tuple[int, ...], size: int, rank: int) -> Tensor:
    """Places in a row that a rank has, `[S]`, on the CPU.

    Args:
        lengths: Tokens of each sample of the row, multiples of `2 * size`.
        size: Ranks.
        rank: One of them.
    """
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    places = [
        torch.arange(start + chunk.start, start + chunk.stop, device="cpu")
        for start, length in zip(starts, lengths, strict=True)
        for chunk in chunks_of_rank(length, size, rank)
    ]
    return torch.cat(places)


def part_of_rank(whole: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's part of one sample along its first axis; all of it if no ranks share it."""
    if group is None or group.size() == 1:
        return whole
    return torch.cat([whole[chunk] for chunk in chunks_of_rank(len(whole), group.size(), group.rank())])


def gather(parts: Sequence[Tensor], lengths: tuple[int, ...], group: dist.ProcessGroup) -> list[Tensor]:
    """Rows `[T, ...]` of all ranks' parts `[S, ...]`. In backward a rank gets all ranks' gradients of its own part.

    Args:
        parts: Tensors of this rank that differ in their last axis only; one exchange takes them all.
        lengths: Tokens of each sample of the row.
        group: Ranks that share them.
    """
    together = torch.cat(list(parts), dim=-1)
    by_rank = gather_from_sequence_parallel_region(together, tensor_parallel_output_grad=True, group=group)
    in_order = by_rank.index_select(0, _order(lengths, group.size()).to(by_rank.device))
    return list(in_order.split([part.shape[-1] for part in parts], dim=-1))


def queries_and_keys(length: int, size: int, rank: int) -> Iterator[tuple[slice, int]]:
    """For each chunk of a rank: where it is in the rank's own part, and the end of the keys that it may look at."""
    start = 0
    for chunk in chunks_of_rank(length, size, rank):
        width = chunk.stop - chunk.start
        yield slice(start, start + width), chunk.stop
        start += width


@lru_cache(maxsize=64)
def _order(lengths: tuple[int, ...], size: int) -> Tensor:
    """Where each place of a row is among the parts of all ranks laid end to end, `[T]`."""
    return torch.cat([places_of_rank(lengths, size, rank) for rank in range(size)]).argsort()
