"""Weights of a Hugging Face folder, a few rows at a time: reading by memory map, and writing safetensors whose names
and sizes are known before the first byte is written.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from mcore.bridge.dims import Shape
from mcore.bridge.hf_dequantise import dequantise_fp8, dequantise_mxfp4
from mcore.bridge.hf_headers import DTYPES, INDEX_FILE, SINGLE_FILE, StoredTensor
from mcore.bridge.hf_tensors import HfTensor

ROWS_DEQUANTISED = 128
"""Rows that are dequantised at a time: as many as a usual block has, so that the work stays in a processor's cache."""
CODE_OF = {torch_name: (code, item_bytes) for code, (torch_name, item_bytes) in DTYPES.items()}


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


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written: its name, torch's name of its dtype, and its shape."""

    name: str
    dtype: str
    shape: Shape

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * CODE_OF[self.dtype][1]


def divide_into_shards(specs: Iterable[TensorSpec], max_shard_bytes: int) -> dict[str, tuple[TensorSpec, ...]]:
    """Which tensors go into which file, in the given order. A tensor larger than a shard gets one of its own."""
    shards: list[list[TensorSpec]] = []
    room = 0
    for spec in specs:
        if not shards or spec.num_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(spec)
        room -= spec.num_bytes
    if len(shards) == 1:
        return {SINGLE_FILE: tuple(shards[0])}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": tuple(shard) for i, shard in enumerate(shards, 1)}


class SafetensorsWriter:
    """Writes the shards of a model, rows in any order; leaving the block well says that every row was written."""

    def __init__(self, folder: Path, shards: Mapping[str, Sequence[TensorSpec]]) -> None:
        self._specs: dict[str, TensorSpec] = {}
        self._places: dict[str, tuple[int, int]] = {}
        self._missing_values: dict[str, int] = {}
        self._files: list[int] = []
        self.num_bytes = sum(spec.num_bytes for shard in shards.values() for spec in shard)
        for name, shard in shards.items():
            self._open(folder / name, shard)
        if set(shards) != {SINGLE_FILE}:
            weight_map = {spec.name: name for name, shard in shards.items() for spec in shard}
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")

    def _open(self, path: Path, shard: Sequence[TensorSpec]) -> None:
        # Wide dtypes first, so that each tensor begins at a multiple of its item's size, as readers by map need it.
        ordered = sorted(shard, key=lambda spec: -CODE_OF[spec.dtype][1])
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for spec in ordered:
            end = offset + spec.num_bytes
            code = CODE_OF[spec.dtype][0]
            header[spec.name] = {"dtype": code, "shape": list(spec.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        self._files.append(file)
        _write_all(file, struct.pack("<Q", len(text)) + text, 0)
        for spec in ordered:
            start = 8 + len(text) + header[spec.name]["data_offsets"][0]  # type: ignore[index]
            self._specs[spec.name] = spec
            self._places[spec.name] = (file, start)
            self._missing_values[spec.name] = math.prod(spec.shape)

    def write_rows(self, name: str, first_row: int, rows: Tensor) -> None:
        """Write rows of a tensor, from `first_row` on. Each row is written once.

        Args:
            name: The tensor's name.
            first_row: The first row's number. Rows of stacked matrices are counted through all of them.
            rows: `[rows, …]`, in the tensor's dtype.
        """
        spec = self._specs[name]
        row_shape = spec.shape[len(spec.shape) - rows.dim() + 1 :]
        assert rows.shape[1:] == row_shape and rows.dtype == getattr(torch, spec.dtype), (name, rows.shape)
        file, start = self._places[name]
        row_bytes = math.prod(row_shape) * CODE_OF[spec.dtype][1]
        data = rows.contiguous().flatten().view(torch.uint8).numpy().data
        _write_all(file, data, start + first_row * row_bytes)
        self._missing_values[name] -= rows.numel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: object, _trace: object) -> None:
        for file in self._files:
            os.close(file)
        if kind is None:
            assert not any(self._missing_values.values()), {name: n for name, n in self._missing_values.items() if n}


def _write_all(file: int, data: bytes | memoryview, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(file, rest, offset)
        rest, offset = rest[written:], offset + written
