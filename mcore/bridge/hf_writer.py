"""Writes the safetensors of a Hugging Face folder: all names, sizes and places are known before the first byte is
written, so any process may write any rows.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mcore.bridge.dims import Shape
from mcore.bridge.dist_writer import bytes_of
from mcore.bridge.hf_headers import DTYPES, INDEX_FILE, SINGLE_FILE
from mcore.bridge.output_file import OutputFile, stage_for

CODE_OF = {torch_name: (code, item_bytes) for code, (torch_name, item_bytes) in DTYPES.items()}


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


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's data begins."""

    spec: TensorSpec
    file: Path
    offset: int


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


def create_shards(folder: Path, shards: Mapping[str, Sequence[TensorSpec]]) -> dict[str, Place]:
    """Make all files at their full length, with headers and index, and holes where the data goes.

    Returns:
        Where each tensor is to be written, by its name.
    """
    places = {place.spec.name: place for name, shard in shards.items() for place in _create(folder / name, shard)}
    if set(shards) != {SINGLE_FILE}:
        weight_map = {spec.name: name for name, shard in shards.items() for spec in shard}
        num_bytes = sum(place.spec.num_bytes for place in places.values())
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return places


def _create(path: Path, shard: Sequence[TensorSpec]) -> list[Place]:
    # Wide dtypes first, so that each tensor begins at a multiple of its item's size, as readers by map need it.
    ordered = sorted(shard, key=lambda spec: -CODE_OF[spec.dtype][1])
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ends = [0]
    for spec in ordered:
        ends.append(ends[-1] + spec.num_bytes)
        code = CODE_OF[spec.dtype][0]
        header[spec.name] = {"dtype": code, "shape": list(spec.shape), "data_offsets": ends[-2:]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(start + ends[-1])
    return [Place(spec, path, start + end) for spec, end in zip(ordered, ends[:-1], strict=True)]


class SafetensorsWriter:
    """Writes rows into the files that `create_shards` made, in any order."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        self._places = places
        self._stage = stage_for(sum(place.spec.num_bytes for place in places.values()))
        self._files: dict[Path, OutputFile] = {}
        self._written: Counter[str] = Counter()

    def write_rows(self, name: str, first_row: int, rows: Tensor) -> None:
        """Write rows of a tensor, from `first_row` on. Each row is written once.

        Args:
            name: The tensor's name.
            first_row: The first row's number. Rows of stacked matrices are counted through all of them.
            rows: `[rows, …]`, in the tensor's dtype.
        """
        spec = self._places[name].spec
        row_shape = spec.shape[len(spec.shape) - rows.dim() + 1 :]
        assert rows.shape[1:] == row_shape and rows.dtype == getattr(torch, spec.dtype), (name, rows.shape)
        self.write_blocks(name, first_row * math.prod(row_shape) * rows.itemsize, [bytes_of(rows)])

    def write_blocks(self, name: str, first_byte: int, blocks: Iterable[bytes | memoryview]) -> None:
        """Write bytes of a tensor, block behind block, from its `first_byte` on. Each byte is written once."""
        place = self._places[name]
        if place.file not in self._files:
            self._files[place.file] = OutputFile(place.file, self._stage)
        start = end = place.offset + first_byte
        for block in blocks:
            end = self._files[place.file].write(block, end)
        assert end <= place.offset + place.spec.num_bytes, name
        self._written[name] += end - start

    def close(self) -> Counter[str]:
        """Wait until all is on the disk.

        Returns:
            Bytes that were written of each tensor.
        """
        while self._files:
            self._files.popitem()[1].close()
        return self._written


def refuse_gaps(places: Mapping[str, Place], written: Iterable[Counter[str]]) -> None:
    """Check that the writers together have written all of every tensor: a defect of the caller if not."""
    total: Counter[str] = sum(written, Counter())
    wrong = {name: total[name] for name, place in places.items() if total[name] != place.spec.num_bytes}
    assert not wrong, wrong
