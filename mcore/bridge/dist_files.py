"""torch_dist checkpoints, megatron-core's own format, written and read without a model and without process groups.

    .metadata        torch's DCP metadata, pickled: shape, dtype and chunks of every tensor, and where each chunk lies
    __0_0.distcp     chunks one after another, each as torch.save wrote it
    common.pt        what is the same on all ranks: a plain dictionary
    metadata.json    name and version of the format, written last: without it there is no checkpoint

Layers of a homogeneous decoder are stacked: `decoder.layers.mlp.linear_fc2.weight` is `[num_layers, hidden, ffn]`.
Source: megatron-core 0.16.1 `dist_checkpointing/strategies/torch.py`;
torch 2.13 `distributed/checkpoint/filesystem.py`.
"""

from __future__ import annotations

import io
import json
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem as dcp_filesystem
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint import planner as dcp_planner
from torch.distributed.checkpoint.utils import _create_file_view

from mcore.bridge.dims import Shape
from mcore.errors import CheckpointError, Problem
from mcore.select import completeness_problems

SHARD = "__0_0.distcp"
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}

_PLAIN = {
    "torch": (torch, ("Size", "bfloat16", "float16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64")),
    "torch.serialization": (torch.serialization, ("_get_layout",)),
    "torch.distributed.checkpoint.metadata": (
        dcp,
        (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        ),
    ),
    "torch.distributed.checkpoint.filesystem": (dcp_filesystem, ("_StorageInfo",)),
    "torch.distributed.checkpoint.planner": (
        dcp_planner,
        ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    ),
}
"""All that a `.metadata` file may name. None of it does more than hold values."""


class DistWriter:
    """Writes a checkpoint chunk by chunk. The same calls give the same bytes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = (folder / SHARD).open("wb")
        self._entries: dict[str, Any] = {}
        self._places: dict[Any, Any] = {}

    def write_chunk(self, key: str, shape: Shape, offsets: Sequence[int], chunk: Tensor) -> None:
        """Append a part of a tensor.

        Args:
            key: The tensor's key.
            shape: The whole tensor's shape.
            offsets: Where the chunk begins, one number an axis.
            chunk: The part, with as many axes as the whole.
        """
        properties = dcp.TensorProperties(dtype=chunk.dtype)
        entry = self._entries.setdefault(key, dcp.TensorStorageMetadata(properties, torch.Size(shape), []))
        assert entry.properties.dtype == chunk.dtype and entry.size == torch.Size(shape), key
        index = dcp.MetadataIndex(key, offsets, len(entry.chunks))
        entry.chunks.append(dcp.ChunkStorageMetadata(torch.Size(offsets), chunk.shape))
        start = self._file.tell()
        with _without_crc():
            torch.save(chunk, self._file)
        self._note(index, start)

    def write_empty_object(self, key: str) -> None:
        """Append an object that holds None, as megatron-core's `_extra_state` without FP8 does."""
        self._entries[key] = dcp.BytesStorageMetadata()
        start = self._file.tell()
        torch.save([None], self._file)
        self._note(dcp.MetadataIndex(key), start)

    def finish(self, common: Mapping[str, Any]) -> int:
        """Write everything that says where the chunks are, and the format's name last.

        Returns:
            Bytes of all chunks.
        """
        num_bytes = self._file.tell()
        self._file.close()
        metadata = dcp.Metadata(self._entries, storage_data=self._places, version=dcp_filesystem.CURRENT_DCP_VERSION)
        (self._folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol=4))
        torch.save(dict(common), self._folder / "common.pt")
        (self._folder / "metadata.json").write_text(json.dumps(FORMAT))
        return num_bytes

    def _note(self, index: dcp.MetadataIndex, start: int) -> None:
        self._places[index] = dcp_filesystem._StorageInfo(SHARD, start, self._file.tell() - start)


@contextmanager
def _without_crc() -> Iterator[None]:
    """Half of torch.save's time goes into checksums that torch.load never looks at."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a tensor, and the place of its bytes.

    The file holds a tensor of `stored_sizes`; `index` on its leading axes and then a reshape to `sizes` make the part.
    """

    offsets: Shape
    sizes: Shape
    file: Path
    offset: int
    num_bytes: int
    stored_sizes: Shape
    index: Shape = ()


@dataclass(frozen=True, slots=True)
class DistTensor:
    """A tensor of a checkpoint: its global shape, torch's name of its dtype, and its chunks."""

    key: str
    shape: Shape
    dtype: str
    chunks: tuple[Chunk, ...]
    _depth: int = field(init=False, default=0)
    """Leading axes on which every chunk has a single place: those that layers and experts are stacked on."""
    _by_index: Mapping[tuple[int, ...], Sequence[Chunk]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        depth = 0
        while depth < len(self.shape) - 1 and all(chunk.sizes[depth] == 1 for chunk in self.chunks):
            depth += 1
        by_index: dict[tuple[int, ...], list[Chunk]] = {}
        for chunk in self.chunks:
            by_index.setdefault(chunk.offsets[:depth], []).append(chunk)
        object.__setattr__(self, "_depth", depth)
        object.__setattr__(self, "_by_index", by_index)

    def _box(self, index: Sequence[int], rows: slice | None = None) -> tuple[list[int], list[int]]:
        """Offsets and sizes of what is at `index` of the leading axes: all rows of it, or some."""
        depth = len(index)
        offsets = [*index, *(0,) * (len(self.shape) - depth)]
        sizes = [*(1,) * depth, *self.shape[depth:]]
        if rows is not None:
            offsets[depth], sizes[depth] = rows.start, rows.stop - rows.start
        return offsets, sizes

    def _near(self, offsets: Sequence[int], sizes: Sequence[int]) -> Sequence[Chunk]:
        """Chunks that may hold something of a box."""
        depth = self._depth
        is_one_place = all(size == 1 for size in sizes[:depth])
        return self._by_index.get(tuple(offsets[:depth]), ()) if is_one_place else self.chunks

    def row_windows(self, index: Sequence[int] = ()) -> list[slice]:
        """Rows that can be read without reading a chunk twice, in order; all of them together are all rows.

        Args:
            index: Place on the leading axes, on which megatron stacks layers and experts.
        """
        axis = len(index)
        offsets, sizes = self._box(index)
        chunks = [chunk for chunk in self._near(offsets, sizes) if _overlap(chunk, offsets, sizes)]
        # Rows between two edges belong together unless no chunk reaches over an edge.
        starts = sorted({chunk.offsets[axis] for chunk in chunks})
        edges = [
            start
            for start in starts
            if not any(c.offsets[axis] < start < c.offsets[axis] + c.sizes[axis] for c in chunks)
        ]
        return [slice(start, end) for start, end in zip(edges, [*edges[1:], self.shape[axis]], strict=True)]

    def read_rows(self, index: Sequence[int], rows: slice) -> Tensor:
        """Rows at one place of the leading axes, `[rows, …]`. Raises as `read_box`."""
        offsets, sizes = self._box(index, rows)
        return self.read_box(offsets, sizes).reshape(sizes[len(index) :])

    def read_box(self, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A part of the tensor, put together from whatever chunks hold it.

        Args:
            offsets: Where it begins, one number an axis.
            sizes: Its shape.

        Raises:
            CheckpointError: A chunk can't be read, is not what the metadata says, or numbers are missing.
        """
        sizes = list(sizes)
        out: Tensor | None = None
        filled = 0
        for chunk in self._near(offsets, sizes):
            overlap = _overlap(chunk, offsets, sizes)
            if overlap is None:
                continue
            part = _load(self, chunk)[_slices(overlap, chunk.offsets)]
            if list(part.shape) == sizes:
                out = part  # one chunk holds all of it: no copy
            else:
                out = torch.empty(sizes, dtype=part.dtype) if out is None else out
                out[_slices(overlap, offsets)] = part
            filled += part.numel()
        if out is None or filled != math.prod(sizes):
            raise CheckpointError(
                "a tensor of the checkpoint is not whole",
                [Problem(self.key, f"{math.prod(sizes)} numbers at {list(offsets)}", f"{filled} in its chunks")],
            )
        return out


def read_dist_tensors(folder: Path) -> dict[str, DistTensor]:
    """All tensors of a checkpoint by key, weights and others; no data is read.

    Args:
        folder: The folder of one iteration, with `.metadata` in it.

    Raises:
        CheckpointError: The checkpoint is not complete, or its metadata names anything but plain values.
    """
    if problems := completeness_problems(folder):
        raise CheckpointError(f"{folder} is not a complete checkpoint", problems)
    try:
        metadata = _RestrictedUnpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
        places = {(index.fqn, index.offset): info for index, info in metadata.storage_data.items()}
        return {
            key: _tensor(key, entry, places, folder)
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, dcp.TensorStorageMetadata)
        }
    except Exception as exc:  # a damaged pickle may raise anything
        raise CheckpointError(
            f"{folder} is damaged", [Problem(str(folder / ".metadata"), "torch's DCP metadata", repr(exc))]
        ) from exc


def _tensor(key: str, entry: dcp.TensorStorageMetadata, places: Mapping[Any, Any], folder: Path) -> DistTensor:
    chunks = []
    for chunk in entry.chunks:
        info = places[key, chunk.offsets]
        if Path(info.relative_path).name != info.relative_path:
            raise ValueError(f"{info.relative_path!r} is no name of a file in the folder")
        file = folder / info.relative_path
        sizes = tuple(chunk.sizes)
        chunks.append(Chunk(tuple(chunk.offsets), sizes, file, info.offset, info.length, stored_sizes=sizes))
    return DistTensor(key, tuple(entry.size), str(entry.properties.dtype).removeprefix("torch."), tuple(chunks))


def _load(tensor: DistTensor, chunk: Chunk) -> Tensor:
    try:
        with chunk.file.open("rb") as file:
            view = _create_file_view(file, chunk.offset, chunk.num_bytes)
            loaded = torch.load(cast(IO[bytes], view), map_location="cpu", weights_only=True)
    except Exception as exc:  # damaged bytes may raise anything
        raise CheckpointError(
            "a chunk of the checkpoint can't be read", [Problem(f"{tensor.key} in {chunk.file}", found=repr(exc))]
        ) from exc
    expected = (chunk.stored_sizes, f"torch.{tensor.dtype}")
    found = (tuple(loaded.shape), str(loaded.dtype)) if isinstance(loaded, Tensor) else type(loaded).__name__
    if found != expected:
        raise CheckpointError(
            "a chunk of the checkpoint is damaged",
            [Problem(f"{tensor.key} in {chunk.file}", str(expected), str(found))],
        )
    return cast(Tensor, loaded)[chunk.index].reshape(chunk.sizes)


def _overlap(chunk: Chunk, offsets: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]] | None:
    """Where a chunk and a box share numbers, as first and end of each axis; None if they share none."""
    shared = [
        (max(c, o), min(c + cs, o + os))
        for c, cs, o, os in zip(chunk.offsets, chunk.sizes, offsets, sizes, strict=True)
    ]
    return shared if all(first < end for first, end in shared) else None


def _slices(box: Sequence[tuple[int, int]], offsets: Sequence[int]) -> tuple[slice, ...]:
    """The box inside of a tensor that begins at `offsets`."""
    return tuple(slice(first - offset, end - offset) for (first, end), offset in zip(box, offsets, strict=True))


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        holder, names = _PLAIN.get(module, (None, ()))
        if name not in names:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")
        return getattr(holder, name)
