"""Samples that one process tokenised and all have: no machine, and no process, does the work of another again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from mcore.backend.parallel import on_rank_0
from mcore.data.dataset import TokenDataset

Datasets = tuple[TokenDataset, TokenDataset]
CHUNK = 2**28
"""Elements that are sent at once."""


def read_once(read: Callable[[], Datasets]) -> Datasets:
    """What `read` returns on rank 0, on every rank; all ranks call it. What it raises there is raised everywhere.

    The arrays go over gloo from host to host, also where training talks over NCCL: they are no device's business.
    """
    if dist.get_world_size() == 1:
        return read()
    mine: list[Datasets] = []

    def describe() -> list[tuple[dict[str, object], list[tuple[str, int]]]]:
        mine.append(read())
        return [(one.description(), [(array.dtype.str, array.size) for array in one.arrays()]) for one in mine[0]]

    described = on_rank_0(describe)
    group = dist.new_group(backend="gloo")
    try:
        datasets = []
        for number, (description, shapes) in enumerate(described):
            arrays = mine[0][number].arrays() if mine else [np.empty(size, dtype) for dtype, size in shapes]
            for array in arrays:
                _broadcast(array, group)
            datasets.append(mine[0][number] if mine else TokenDataset.of_arrays(description, arrays))
    finally:
        dist.destroy_process_group(group)
    return datasets[0], datasets[1]


def _broadcast(array: np.ndarray, group: dist.ProcessGroup) -> None:
    """Send rank 0's array, of any length, into the others' in place."""
    whole = torch.from_numpy(array.view(np.uint8))
    for begin in range(0, len(whole), CHUNK):
        dist.broadcast(whole[begin : begin + CHUNK], src=0, group=group)
