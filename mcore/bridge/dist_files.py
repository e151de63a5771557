"""torch_dist checkpoints, megatron-core's own format, read without a model and without process groups.

    .metadata        torch's DCP metadata, pickled: shape, dtype and chunks of every tensor, and where each chunk lies
    __0_0.distcp     chunks one after another, each as torch.save wrote it; other processes wrote __1_0.distcp and so on
    common.pt        what is the same on all ranks: a plain dictionary
    metadata.json    name and version of the format, written last: without it there is no checkpoint

Layers of a homogeneous decoder are stacked: `decoder.layers.mlp.linear_fc2.weight` is `[num_layers, hidden, ffn]`.
Source: megatron-core 0.16.1 `dist_checkpointing/strategies/torch.py`;
torch 2.13 `distributed/checkpoint/filesystem.py`.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem as dcp_filesystem
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint import planner as dcp_planner
from torch.distributed.checkpoint.utils import _create_file_view

from mcore.bridge.chunk_frames import framed_tensor
from mcore.bridge.dims import Shape
from mcore.bridge.spans import Span
from mcore.errors import CheckpointError, Problem
from mcore.select import completeness_problems

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

    def spans(self, index: Sequence[int], rows: slice) -> list[Span] | None:
        """Where in the files the bytes of some rows lie, in order; None if they are not there row by row.

        Whatever is wrong with a chunk is left for `read_rows` to say.
        """
        offsets, sizes = self._box(index, rows)
        axis = len(index)
        itemsize = _itemsize(self.dtype)
        found: list[tuple[int, int, Span]] = []
        for chunk in self._near(offsets, sizes):
            overlap = _overlap(chunk, offsets, sizes)
            if overlap is None:
                continue
            start = _data_offset(self, chunk)
            if start is None or chunk.sizes[axis + 1 :] != self.shape[axis + 1 :]:
                return None
            row_bytes = math.prod(self.shape[axis + 1 :]) * itemsize
            (first, end), num_rows = overlap[axis], chunk.sizes[axis]
            place = _flat([first for first, _ in overlap[:axis]], chunk.offsets, chunk.sizes)
            place = place * num_rows + first - chunk.offsets[axis]
            found.append((first, end, Span(chunk.file, start + place * row_bytes, (end - first) * row_bytes)))
        found.sort(key=lambda piece: piece[:2])
        edges = [rows.start, *(end for _, end, _ in found)]
        is_whole = [first for first, _, _ in found] == edges[:-1] and edges[-1] == rows.stop
        return [span for _, _, span in found] if is_whole else None


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


def refuse_code(folder: Path) -> None:
    """Check that what a checkpoint holds beside tensors are plain values and classes that megatron-core vouches for.

    torch unpickles these objects without asking, and what a pickle names is run. Megatron-core keeps the list of what
    its own checkpoints name; whoever calls this has imported it.

    Args:
        folder: The folder of one iteration, which `read_dist_tensors` has read.

    Raises:
        CheckpointError: Names everything that is not of these; nothing of it was run.
    """
    metadata = _RestrictedUnpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
    problems = []
    for index, info in metadata.storage_data.items():
        if not isinstance(metadata.state_dict_metadata[index.fqn], dcp.BytesStorageMetadata):
            continue
        try:
            with (folder / info.relative_path).open("rb") as file:
                view = _create_file_view(file, info.offset, info.length)
                torch.load(cast(IO[bytes], view), map_location="meta", weights_only=True)
        except Exception as exc:  # damaged bytes may raise anything
            reason = str(exc).partition("\n")[0]
            problems.append(Problem(f"{index.fqn} in {folder}", "plain values", f"{type(exc).__name__}: {reason}"))
    if problems:
        raise CheckpointError(f"{folder} holds what is not opened", problems)


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


def _data_offset(tensor: DistTensor, chunk: Chunk) -> int | None:
    """Where a chunk's first number lies in its file, if its numbers lie there in order."""
    try:
        found = framed_tensor(chunk.file, chunk.offset, chunk.num_bytes)
    except Exception:  # `_load` meets it again, and says what it is
        return None
    if found is None or (found.shape, found.dtype) != (chunk.stored_sizes, tensor.dtype):
        return None
    place = _flat(chunk.index, (0,) * len(chunk.index), chunk.stored_sizes)
    return found.data_offset + place * math.prod(chunk.sizes) * _itemsize(tensor.dtype)


def _flat(places: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> int:
    """Number of a place on leading axes, counted through all of them."""
    number = 0
    for place, offset, size in zip(places, offsets, sizes, strict=False):
        number = number * size + place - offset
    return number


def _itemsize(dtype: str) -> int:
    itemsize: int = getattr(torch, dtype).itemsize
    return itemsize


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
