"""The frame that torch.save puts around a tensor's bytes: a small zip archive, in which they lie as they are.

Knowing it, a chunk of a checkpoint is written without ever being whole in memory, and read without torch.load.

torch itself makes and reads the frame here, only without the bytes: `torch.save` under `skip_data` leaves out a gap for
them, and `torch.load` onto the meta device says where they begin. Source: torch 2.13 `serialization.py`.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.utils import _create_file_view

from mcore.bridge.dims import Shape


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands before and behind a tensor's bytes."""

    head: bytes
    tail: bytes


@dataclass(frozen=True, slots=True)
class FramedTensor:
    """What a frame says of its tensor, and where in the file its bytes begin."""

    dtype: str
    shape: Shape
    data_offset: int


@functools.lru_cache(maxsize=1024)
def frame_of(dtype: str, shape: Shape) -> Frame:
    """The frame of a contiguous tensor.

    Args:
        dtype: torch's name of its dtype.
        shape: Its shape, of at least one number.
    """
    recorder = _Recorder()
    with torch.serialization.skip_data():
        torch.save(torch.empty(shape, dtype=getattr(torch, dtype)), cast(IO[bytes], recorder))  # pages never touched
    head, tail = recorder.parts
    return Frame(bytes(head), bytes(tail))


class _Recorder:
    """A file for torch.save that keeps what is written before and behind the gap."""

    def __init__(self) -> None:
        self.parts = [bytearray()]

    def write(self, data: bytes) -> int:
        self.parts[-1] += data
        return len(data)

    def seek(self, offset: int, whence: int) -> None:
        assert whence == os.SEEK_CUR
        self.parts.append(bytearray())

    def flush(self) -> None:
        pass


@functools.lru_cache(maxsize=4096)
def framed_tensor(file: Path, offset: int, num_bytes: int) -> FramedTensor | None:
    """What a chunk holds, told by its frame; None if its bytes do not lie there row by row and whole.

    Args:
        file: A file of a checkpoint.
        offset: Where in it the chunk begins, frame and all.
        num_bytes: Bytes of the chunk.

    Raises:
        Exception: Whatever torch.load raises for what is no such chunk.
    """
    with file.open("rb") as opened:
        view = cast(IO[bytes], _create_file_view(opened, offset, num_bytes))
        tensor = torch.load(view, map_location="meta", weights_only=True)
    if not isinstance(tensor, Tensor):
        return None
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None or not tensor.is_contiguous() or start + tensor.untyped_storage().nbytes() > num_bytes:
        return None
    dtype = str(tensor.dtype).removeprefix("torch.")
    return FramedTensor(dtype, tuple(tensor.shape), offset + start + tensor.storage_offset() * tensor.itemsize)
