"""Writes torch_dist checkpoints without a model and without process groups: the files that `dist_files.py` reads.

Each process writes a shard of its own, chunk by chunk. When all are done, one of them writes what says where the
chunks are.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem as dcp_filesystem
from torch.distributed.checkpoint import metadata as dcp

from mcore.bridge.chunk_frames import frame_of
from mcore.bridge.dims import Shape
from mcore.bridge.output_file import OutputFile, Stage

FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a tensor that is to be written.

    Args:
        key: The tensor's key.
        shape: The whole tensor's shape.
        dtype: torch's name of its dtype.
        offsets: Where the part begins, one number an axis.
        sizes: Its shape, with as many axes as the whole.
    """

    key: str
    shape: Shape
    dtype: str
    offsets: Shape
    sizes: Shape


@dataclass(frozen=True, slots=True)
class Written:
    """What stands where in a shard: a part of a tensor, or an object by its key."""

    what: Part | str
    file: str
    offset: int
    num_bytes: int


class DistWriter:
    """Writes one shard of a checkpoint. The same calls give the same bytes.

    Args:
        folder: The folder of the checkpoint.
        number: The shard's.
        stage: Of a large checkpoint, to write it around the page cache.
    """

    def __init__(self, folder: Path, number: int = 0, stage: Stage | None = None) -> None:
        self._folder = folder
        self._name = f"__{number}_0.distcp"
        self._file = OutputFile(folder / self._name, stage)
        self._end = 0
        self._written: list[Written] = []

    def write_blocks(self, part: Part, blocks: Iterable[bytes | memoryview]) -> None:
        """Append a part of a tensor, as torch.save would write it.

        Args:
            part: What it is.
            blocks: All of its bytes, one block behind the other.
        """
        start = self._end
        frame = frame_of(part.dtype, part.sizes)
        self._append(frame.head)
        for block in blocks:
            self._append(block)
        self._append(frame.tail)
        self._written.append(Written(part, self._name, start, self._end - start))

    def write_chunk(self, key: str, shape: Shape, offsets: Sequence[int], chunk: Tensor) -> None:
        """Append a part of a tensor that is in memory; `chunk` tells what else a `Part` has."""
        part = Part(key, shape, str(chunk.dtype).removeprefix("torch."), tuple(offsets), tuple(chunk.shape))
        self.write_blocks(part, [bytes_of(chunk)])

    def write_empty_object(self, key: str) -> None:
        """Append an object that holds None, as megatron-core's `_extra_state` without FP8 does."""
        blob = io.BytesIO()
        torch.save([None], blob)
        start = self._end
        self._append(blob.getvalue())
        self._written.append(Written(key, self._name, start, self._end - start))

    def close(self) -> list[Written]:
        """Wait until all is on the disk.

        Returns:
            What `write_metadata` needs to know of this shard.
        """
        self._file.close()
        return self._written

    def finish(self, common: Mapping[str, Any]) -> int:
        """Make a checkpoint of this shard alone. Arguments and result as those of `write_metadata`."""
        return write_metadata(self._folder, self.close(), common)

    def _append(self, data: bytes | memoryview) -> None:
        self._end = self._file.write(data, self._end)


def write_metadata(folder: Path, written: Iterable[Written], common: Mapping[str, Any]) -> int:
    """Write everything that says where the chunks are, and the format's name last.

    Args:
        folder: The folder that holds the shards.
        written: What is in them, shard by shard.
        common: What is the same on all ranks.

    Returns:
        Bytes of all chunks.
    """
    entries: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    num_bytes = 0
    for piece in written:
        place = dcp_filesystem._StorageInfo(piece.file, piece.offset, piece.num_bytes)
        num_bytes += piece.num_bytes
        if isinstance(piece.what, str):
            entries[piece.what] = dcp.BytesStorageMetadata()
            places[dcp.MetadataIndex(piece.what)] = place
            continue
        part, dtype = piece.what, getattr(torch, piece.what.dtype)
        whole = dcp.TensorStorageMetadata(dcp.TensorProperties(dtype=dtype), torch.Size(part.shape), [])
        entry = entries.setdefault(part.key, whole)
        assert entry.properties.dtype == dtype and entry.size == whole.size, part.key
        places[dcp.MetadataIndex(part.key, part.offsets, len(entry.chunks))] = place
        entry.chunks.append(dcp.ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.sizes)))
    metadata = dcp.Metadata(entries, storage_data=places, version=dcp_filesystem.CURRENT_DCP_VERSION)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol=4))
    torch.save(dict(common), folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(FORMAT))
    return num_bytes


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes, without a copy if it is contiguous."""
    view: memoryview = tensor.contiguous().flatten().view(torch.uint8).numpy().data
    return view
