"""Files that are written at places of their own, and are on the disk when they are closed.

Large files go around the page cache (O_DIRECT): nobody reads 15 GB again before they are pushed out of it, and without
it the kernel neither copies the bytes once more nor has them all left to write when the file is synced. What is written
so must begin and end at pages, in memory and in the file. So a run of bytes is gathered in a stage of whole pages; the
ends of a run, which share their page with others, take the ordinary way.

No torch here. Source: open(2), "O_DIRECT"; sync_file_range(2).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path

from mcore.errors import ConversionError, Problem

DIRECT_FROM_BYTES = 2 * 2**30
"""What is smaller as a whole stays in the page cache, as whoever comes next reads it at once."""
STAGE_BYTES = 4 * 2**20
DIRECT_RUN_BYTES = 64 * 2**10
"""A shorter run is not worth the wait for the disk."""
WRITEBACK_BYTES = 32 * 2**20
"""Bytes through the page cache after which the kernel is asked to begin to bring them to the disk."""


class Stage:
    """Pages that gather what a file is written next. Several files may take turns."""

    def __init__(self) -> None:
        self.memory = memoryview(mmap.mmap(-1, STAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self.file: OutputFile | None = None

    def belong_to(self, file: OutputFile) -> None:
        """Let a file have it; what another one has in it is written first."""
        if self.file is not None and self.file is not file:
            self.file.flush()
        self.file = file


def stage_for(num_bytes: int) -> Stage | None:
    """A stage if this is so much that it should go around the page cache."""
    return Stage() if num_bytes >= DIRECT_FROM_BYTES else None


class OutputFile:
    """A file that is written at places of its own.

    Args:
        path: The file; it is made if it is not there.
        stage: What to gather bytes in, to write them around the page cache. None writes them through it, on their way
            to the disk while the file is still being written. So does a file system that knows no other way.
    """

    def __init__(self, path: Path, stage: Stage | None = None) -> None:
        self._path = path
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY, 0o666)
        self._unsynced = 0
        self._stage = stage
        self._direct = None if stage is None else _open_direct(path)
        # The stage holds the bytes from `_begin` to `_end` of the file, from a page's begin on.
        self._begin = self._end = 0

    def write(self, data: bytes | memoryview, offset: int) -> int:
        """Write all of it, at once or when the file is closed.

        Returns:
            Where it ends.

        Raises:
            ConversionError: The file system says no; most likely it is full.
        """
        rest = memoryview(data)
        if self._direct is None or self._stage is None:
            self._write_through(rest, offset)
            return offset + len(rest)
        self._stage.belong_to(self)
        if offset != self._end:
            self.flush()
            self._begin = self._end = offset
        while rest:
            place = self._end - _page_of(self._begin)
            part, rest = rest[: STAGE_BYTES - place], rest[STAGE_BYTES - place :]
            self._stage.memory[place : place + len(part)] = part
            self._end += len(part)
            if place + len(part) == STAGE_BYTES:
                self.flush()
        return self._end

    def flush(self) -> None:
        """Write what is in the stage: whole pages by themselves, the ends through the page cache. Raises as `write`."""
        begin, end, first = self._begin, self._end, _page_of(self._begin)
        self._begin = end
        if begin == end or self._stage is None:
            return
        memory = self._stage.memory
        from_page, to_page = _page_of(begin + mmap.PAGESIZE - 1), _page_of(end)
        if to_page - from_page < DIRECT_RUN_BYTES or self._direct is None:
            self._write_through(memory[begin - first : end - first], begin)
            return
        self._write_through(memory[begin - first : from_page - first], begin)
        self._write_directly(memory[from_page - first : to_page - first], from_page)
        self._write_through(memory[to_page - first : end - first], to_page)

    def close(self) -> None:
        """Wait until all is on the disk. Raises as `write`."""
        try:
            self.flush()
            os.fdatasync(self._file)
        except OSError as exc:
            raise self._failed(exc) from exc
        finally:
            os.close(self._file)
            if self._direct is not None:
                os.close(self._direct)

    def _write_directly(self, rest: memoryview, offset: int) -> None:
        while rest and self._direct is not None:
            try:
                written = os.pwrite(self._direct, rest, offset)
            except OSError as exc:
                if exc.errno != errno.EINVAL:
                    raise self._failed(exc) from exc
                os.close(self._direct)  # larger pages than ours, or no such way at all
                self._direct = None
            else:
                rest, offset = rest[written:], offset + written
        self._write_through(rest, offset)

    def _write_through(self, rest: memoryview, offset: int) -> None:
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

    def _failed(self, exc: OSError) -> ConversionError:
        return ConversionError("a file can't be written", [Problem(str(self._path), found=exc.strerror or str(exc))])


def _page_of(offset: int) -> int:
    return offset - offset % mmap.PAGESIZE


def _open_direct(path: Path) -> int | None:
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError as exc:
        if exc.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return None
        raise


_libc = ctypes.CDLL(None, use_errno=True)
_SYNC_FILE_RANGE_WRITE = 2


def _begin_writeback(file: int) -> None:
    """Without this the kernel waits for seconds, and then all of it is still to be done when the file is synced.

    A wish only: a file system that does not know it says so, and nothing is lost.
    """
    if hasattr(_libc, "sync_file_range"):
        _libc.sync_file_range(file, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)
