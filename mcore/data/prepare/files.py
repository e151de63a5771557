"""The files of a prepared folder: samples in parts as they are made, then the data sets as numbers of samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mcore.data.dataset import Block

SAMPLES = pa.schema(
    {"token_ids": pa.list_(pa.int32()), "loss_mask": pa.list_(pa.float32()), "length": pa.int32(), "place": pa.string()}
)
DATASET = pa.schema({"sample": pa.int64()})

AT_ONCE = 2**20
"""Numbers of samples in a batch of a data set's file."""


def batch_of(block: Block) -> pa.RecordBatch:
    """Samples as they are written."""
    starts = pa.array(block.starts.astype(np.int32))
    return pa.record_batch(
        [
            pa.ListArray.from_arrays(starts, pa.array(block.token_ids)),
            pa.ListArray.from_arrays(starts, pa.array(block.loss_mask)),
            pa.array(np.diff(block.starts).astype(np.int32)),
            pa.array(block.places, pa.string()),
        ],
        schema=SAMPLES,
    )


@contextmanager
def written(path: Path, schema: pa.Schema) -> Iterator[Any]:
    """A file that record batches are appended to (`write`), readable as memory when the block is left."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        yield writer


def write_numbers(path: Path, numbers: np.ndarray) -> None:
    """The file of a data set: which samples it has, in its order, `[samples]`, int64."""
    with written(path, DATASET) as writer:
        for start in range(0, len(numbers), AT_ONCE):
            writer.write(pa.record_batch([pa.array(numbers[start : start + AT_ONCE], pa.int64())], schema=DATASET))
