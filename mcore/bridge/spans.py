"""Bytes that go from file to file as they are.

The bridge moves whole rows, so nearly all that it writes is a sequence of byte ranges of the files that it reads:
spans. They go through one small buffer, block by block. Nothing is mapped, as a mapped page counts as this process's
memory and costs a fault, and the buffer stays in the processor's cache, where a look at a block costs next to nothing.

No torch here.
"""

from __future__ import annotations

import ctypes
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from mcore.errors import ConversionError, Problem

BLOCK_BYTES = 2**20
"""Largest block. A multiple of every item's size, so that no number is cut in two."""
WRITEBACK_BYTES = 32 * 2**20
"""Bytes after which the kernel is asked to begin to bring them to the disk."""
MAX_OPEN_FILES = 64


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a file; or as many zeros, if it is of no file."""

    file: Path | None
    offset: int
    num_bytes: int


class SpanReader:
    """Reads spans through one buffer."""

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(BLOCK_BYTES))
        self._files: OrderedDict[Path, int] = OrderedDict()

    def blocks(self, spans: Iterable[Span]) -> Iterator[memoryview]:
        """What the spans hold, one behind the other. A block is good until the next one is asked for.

        Raises:
            ConversionError: A file ends before a span does.
        """
        filled = 0
        for span in spans:
            done = 0
            while done < span.num_bytes:
                room = self._buffer[filled : filled + span.num_bytes - done]
                self._read(span, done, room)
                done, filled = done + len(room), filled + len(room)
                if filled == BLOCK_BYTES:
                    yield self._buffer
                    filled = 0
        if filled:
            yield self._buffer[:filled]

    def _read(self, span: Span, done: int, out: memoryview) -> None:
        if span.file is None:
            out[:] = bytes(len(out))
            return
        file, offset = self._open(span.file), span.offset + done
        while out:
            count = os.preadv(file, [out], offset)
            if not count:
                raise ConversionError(
                    "a file became shorter while it was read", [Problem(str(span.file), found=f"{offset} bytes")]
                )
            out, offset = out[count:], offset + count

    def _open(self, path: Path) -> int:
        if path not in self._files:
            if len(self._files) == MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[path] = os.open(path, os.O_RDONLY)
        self._files.move_to_end(path)
        return self._files[path]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._files:
            os.close(self._files.popitem()[1])


class OutputFile:
    """A file that is written at places of its own, on its way to the disk while it is still being written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY, 0o666)
        self._unsynced = 0

    def write(self, data: bytes | memoryview, offset: int) -> int:
        """Write all of it.

        Returns:
            Where it ends.

        Raises:
            ConversionError: The file system says no; most likely it is full.
        """
        rest = memoryview(data)
        while rest:
            try:
                written = os.pwrite(self._file, rest, offset)
            except OSError as exc:
                raise self._failed(exc) from exc
            rest, offset = rest[written:], offset + written
            self._unsynced += written
        if self._unsynced >= WRITEBACK_BYTES:
            _begin_writeback(self._file)
            self._unsynced = 0
        return offset

    def close(self) -> None:
        """Wait until all is on the disk. Raises as `write`."""
        try:
            os.fdatasync(self._file)
        except OSError as exc:
            raise self._failed(exc) from exc
        finally:
            os.close(self._file)

    def _failed(self, exc: OSError) -> ConversionError:
        return ConversionError("a file can't be written", [Problem(str(self._path), found=exc.strerror or str(exc))])


_libc = ctypes.CDLL(None, use_errno=True)
_SYNC_FILE_RANGE_WRITE = 2


def _begin_writeback(file: int) -> None:
    """Without this the kernel waits for seconds, and then all of it is still to be done when the file is synced.

    A wish only: a file system that does not know it says so, and nothing is lost. Source: sync_file_range(2).
    """
    if hasattr(_libc, "sync_file_range"):
        _libc.sync_file_range(file, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)
