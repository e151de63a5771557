"""Weights of a Hugging Face folder, a few rows at a time, by memory map."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mcore.bridge.hf_dequantise import dequantise_fp8, dequantise_mxfp4
from mcore.bridge.hf_headers import StoredTensor
from mcore.bridge.hf_tensors import HfTensor

ROWS_DEQUANTISED = 128
"""Rows that are dequantised at a time: as many as a usual block has, so that the work stays in a processor's cache."""


@dataclass(frozen=True, slots=True)
class StoredRows:
    """A stored tensor that is read where it is sliced: `rows[10:20]` maps just these rows' bytes."""

    stored: StoredTensor

    def __getitem__(self, rows: slice) -> Tensor:
        """A tensor over the file's pages, `[rows, …]`; the map goes with it. Writing to it never reaches the file."""
        num_rows, *rest = self.stored.shape
        first, end, step = rows.indices(num_rows)
        if step != 1:
            return self[first:end][::step]
        row_bytes = self.stored.num_bytes // num_rows
        dtype = getattr(torch, self.stored.dtype)
        if end <= first or not row_bytes:
            return torch.empty((max(end - first, 0), *rest), dtype=dtype)
        start = self.stored.offset + first * row_bytes
        slack = start % mmap.ALLOCATIONGRANULARITY
        with self.stored.file.open("rb") as file:
            pages = mmap.mmap(
                file.fileno(), slack + (end - first) * row_bytes, access=mmap.ACCESS_COPY, offset=start - slack
            )
        return torch.frombuffer(pages, dtype=dtype, count=(end - first) * math.prod(rest), offset=slack).reshape(
            -1, *rest
        )


@dataclass(frozen=True, slots=True)
class DequantisedRows:
    """A quantised tensor that is dequantised where it is sliced."""

    tensor: HfTensor

    def __getitem__(self, rows: slice) -> Tensor:
        """A new tensor `[rows, columns]`, bfloat16."""
        num_rows, num_columns = self.tensor.shape
        numbers = range(*rows.indices(num_rows))
        out = torch.empty(len(numbers), num_columns, dtype=torch.bfloat16)
        for start in range(0, len(numbers), ROWS_DEQUANTISED):
            few = numbers[start : start + ROWS_DEQUANTISED]
            out[start : start + len(few)] = self._dequantised(few)
        return out

    def _dequantised(self, rows: range) -> Tensor:
        stored, scales, block = self.tensor.stored, self.tensor.scales, self.tensor.block
        assert scales is not None, self.tensor.name  # the plan refuses them
        codes = StoredRows(replace(stored, dtype="uint8"))[rows.start : rows.stop : rows.step]
        if self.tensor.reading == "mxfp4":
            return dequantise_mxfp4(codes.flatten(1), StoredRows(scales)[rows.start : rows.stop : rows.step])
        of_rows = StoredRows(scales)[rows[0] // block[0] : rows[-1] // block[0] + 1]
        return dequantise_fp8(codes, of_rows, block, rows)


def open_tensor(tensor: HfTensor) -> Any:
    """The tensor of a table as something that gives its rows for a slice."""
    if tensor.reading in ("fp8", "mxfp4"):
        return DequantisedRows(tensor)
    rows = StoredRows(tensor.stored)
    # The rows of a transposed matrix lie scattered, so all of it is read at once: one expert's, which is small.
    return rows[0 : tensor.stored.shape[0]].T if tensor.reading == "transposed" else rows
