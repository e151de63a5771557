"""Reads long spans around the page cache, one window ahead of whoever uses them.

What is read once need not push everything else out of the page cache, and the kernel need not find a page for each page
that is read, which costs more than the reading. What is in the page cache already is taken from there.

No torch here. Source: open(2), "O_DIRECT"; cachestat of Linux 6.5, `include/uapi/linux/mman.h`.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from mcore.bridge.open_files import OpenFiles
from mcore.errors import ConversionError, Problem

WINDOW_BYTES = 4 * 2**20
"""A multiple of every item's size, so that no number is cut in two."""
_CACHESTAT = 451  # the call's number, on every architecture
_libc = ctypes.CDLL(None, use_errno=True)


class DirectReader:
    """Reads ranges of files window by window. A thread reads the next window while one is in use."""

    def __init__(self) -> None:
        size = WINDOW_BYTES + 2 * mmap.PAGESIZE  # what is wanted begins and ends within a page
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._buffers = [memoryview(mmap.mmap(-1, size, flags=private)) for _ in range(2)]
        self._files = OpenFiles(reads_ahead=False)  # else a window that is cached makes the next one so
        self._thread = ThreadPoolExecutor(1, "read ahead")
        self._has_direct = True

    def windows(self, ranges: Iterable[tuple[Path, int, int]]) -> Iterator[memoryview]:
        """What the ranges hold. A window is good until the next one is asked for.

        Args:
            ranges: File, first byte, number of bytes.

        Raises:
            ConversionError: A file ends before a range does.
        """
        buffers = itertools.cycle(self._buffers)
        ahead: Future[memoryview] | None = None
        for file, first, num_bytes in ranges:
            for done in range(0, num_bytes, WINDOW_BYTES):
                size = min(WINDOW_BYTES, num_bytes - done)
                following = self._thread.submit(self._read, file, first + done, size, next(buffers))
                if ahead is not None:
                    yield ahead.result()
                ahead = following
        if ahead is not None:
            yield ahead.result()

    def _read(self, file: Path, first: int, size: int, buffer: memoryview) -> memoryview:
        is_direct = not is_cached(self._files.get(file), first, size)
        skipped = first % mmap.PAGESIZE
        wanted = skipped + size
        whole_pages = buffer[: wanted + -wanted % mmap.PAGESIZE]
        read = 0
        while read < wanted:
            count = self._read_pages(file, whole_pages[read:], first - skipped + read, is_direct)
            if count <= 0:
                found = f"{first - skipped + read} bytes"
                raise ConversionError("a file became shorter while it was read", [Problem(str(file), found=found)])
            read += count
        return buffer[skipped:wanted]

    def _read_pages(self, file: Path, pages: memoryview, offset: int, is_direct: bool) -> int:
        if is_direct and self._has_direct:
            try:
                return os.preadv(self._files.get(file, os.O_DIRECT), [pages], offset)
            except OSError as exc:
                if exc.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                self._has_direct = False  # larger pages than ours, or no such way at all
        return os.preadv(self._files.get(file), [pages], offset)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        self._files.__exit__()


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Pages(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")
    )


def pages_of(file: int, offset: int, size: int) -> _Pages | None:
    """How many pages of a range are in the page cache, and how many of these are still to be written to the disk.

    Not by `RWF_NOWAIT`: a read that may not wait fetches the pages all the same.

    Returns:
        None if the kernel can't tell (before Linux 6.5).
    """
    pages = _Pages()
    wanted = _Range(offset, size)
    return None if _libc.syscall(_CACHESTAT, file, ctypes.byref(wanted), ctypes.byref(pages), 0) else pages


def is_cached(file: int, offset: int, size: int) -> bool:
    """Whether all pages of a range are in the page cache, as far as the kernel can tell."""
    pages = pages_of(file, offset, size)
    return pages is not None and pages.cached * mmap.PAGESIZE >= size
