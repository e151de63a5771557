"""Hugging Face tensors as the proof on disk reads them: with the safetensors package and transformers' dequantisers,
none of which the conversion uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mcore.bridge.hf_headers import StoredTensor
from mcore.bridge.hf_tensors import HfTensor
from mcore.verify.dequantise import fp8_weight, mxfp4_weight

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtype by item size: to compare bits, so that -0.0 and 0.0 differ."""
MAX_MAPPED_BYTES = 256 * 2**20
"""Bytes of Hugging Face files that are read before the maps are let go."""
ROWS_COMPARED = 4096
"""Rows of a tied model's two copies that are compared at a time."""
DEQUANTISED_AT_A_TIME = 2**22
"""Numbers: transformers takes many times the memory of what it makes."""


class HfReader:
    """Rows of safetensors files, which are mapped anew now and then: mapped pages count as this process's memory."""

    def __init__(self, stored: Mapping[str, StoredTensor], found: Mapping[str, HfTensor]) -> None:
        self.stored = stored
        self.found = found
        self._files: dict[Path, Any] = {}
        self._num_mapped_bytes = 0

    def rows(self, name: str, rows: slice) -> Tensor:
        """Rows of a tensor that a table names, `[rows, …]`."""
        tensor = self.found[name]
        if tensor.scales is not None:
            return self._dequantised(tensor, range(rows.start, rows.stop, rows.step or 1))
        saved = self._slices(self.stored[tensor.source])
        if tensor.index is None:
            read: Tensor = saved[rows]
        elif tensor.reading == "transposed":
            read = saved[tensor.index, :, rows].T
        else:
            read = saved[tensor.index, tensor.first_row + rows.start : tensor.first_row + rows.stop : rows.step or 1]
        self._num_mapped_bytes += read.nbytes
        return read

    def equal(self, one: str, other: str) -> bool:
        """Whether two stored tensors hold the same bits."""
        a, b = self.stored[one], self.stored[other]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        for row in range(0, a.shape[0], ROWS_COMPARED):
            rows = [self._slices(stored)[row : row + ROWS_COMPARED] for stored in (a, b)]
            self._num_mapped_bytes += sum(tensor.nbytes for tensor in rows)
            if not torch.equal(*map(bits, rows)):
                return False
        return True

    def _dequantised(self, tensor: HfTensor, rows: range) -> Tensor:
        num_columns = tensor.shape[1]
        at_a_time = max(1, DEQUANTISED_AT_A_TIME // num_columns)
        read = self._mxfp4_rows if tensor.reading == "mxfp4" else self._fp8_rows
        out = torch.empty(len(rows), num_columns, dtype=torch.bfloat16)
        for start in range(0, len(rows), at_a_time):
            few = rows[start : start + at_a_time]
            out[start : start + len(few)] = read(tensor, few)
        return out

    def _mxfp4_rows(self, tensor: HfTensor, rows: range) -> Tensor:
        assert tensor.scales is not None
        place = (tensor.index, slice(rows.start, rows.stop, rows.step))
        blocks_RGB = self._slices(self.stored[tensor.source])[place]
        scales_RG = self._slices(self.stored[tensor.scales.name])[place]
        self._num_mapped_bytes += blocks_RGB.nbytes + scales_RG.nbytes
        return mxfp4_weight(blocks_RGB[None], scales_RG[None])[0].T

    def _fp8_rows(self, tensor: HfTensor, rows: range) -> Tensor:
        """Transformers takes whole blocks, so the rows before and behind in the same blocks are read with them."""
        assert tensor.scales is not None
        size = tensor.block[0]
        first, end = rows[0] // size, rows[-1] // size + 1
        whole = self._slices(self.stored[tensor.source])[first * size : end * size]
        of_scales = self.stored[tensor.scales.name]
        grid = self._file(of_scales).get_tensor(of_scales.name).reshape(tensor.scales.shape)[first:end]
        self._num_mapped_bytes += whole.nbytes + grid.nbytes
        numbers = torch.arange(rows.start, rows.stop, rows.step) - first * size
        return fp8_weight(whole, grid, tensor.block)[numbers]

    def _slices(self, stored: StoredTensor) -> Any:
        return self._file(stored).get_slice(stored.name)

    def _file(self, stored: StoredTensor) -> Any:
        if self._num_mapped_bytes > MAX_MAPPED_BYTES:
            self._files.clear()
            self._num_mapped_bytes = 0
        if stored.file not in self._files:
            self._files[stored.file] = safe_open(stored.file, framework="pt")
        return self._files[stored.file]


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers."""
    return tensor.contiguous().view(BITS[tensor.element_size()])
