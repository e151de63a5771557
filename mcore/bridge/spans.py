"""Bytes that go from file to file as they are.

The bridge moves whole rows, so nearly all that it writes is a sequence of byte ranges of the files that it reads:
spans. They come block by block. Nothing is mapped, as a mapped page counts as this process's memory and costs a fault,
and a block stays in the processor's cache, where a look at it costs next to nothing.

No torch here.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from mcore.bridge.direct_reader import DirectReader
from mcore.bridge.open_files import OpenFiles
from mcore.bridge.output_file import DIRECT_FROM_BYTES
from mcore.errors import ConversionError, Problem

BLOCK_BYTES = 2**20
"""Largest block. A multiple of every item's size, so that no number is cut in two."""
LONG_SPAN_BYTES = 2**18
"""A shorter span is not worth the wait for the disk by itself."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a file; or as many zeros, if it is of no file."""

    file: Path | None
    offset: int
    num_bytes: int


class SpanReader:
    """Reads spans: short ones together through one buffer, long ones of large models around the page cache.

    Args:
        total_bytes: About as much as will be read in all.
    """

    def __init__(self, total_bytes: int = 0) -> None:
        self._buffer = memoryview(bytearray(BLOCK_BYTES))
        self._direct = DirectReader() if total_bytes >= DIRECT_FROM_BYTES else None
        self._files = OpenFiles(reads_ahead=self._direct is None)

    def blocks(self, spans: Iterable[Span]) -> Iterator[memoryview]:
        """What the spans hold, one behind the other. A block is good until the next one is asked for.

        Raises:
            ConversionError: A file ends before a span does.
        """
        if self._direct is None:
            yield from self._buffered(spans)
            return
        for is_long, group in itertools.groupby(spans, lambda span: span.file and span.num_bytes >= LONG_SPAN_BYTES):
            if not is_long:
                yield from self._buffered(group)
                continue
            ranges = ((span.file, span.offset, span.num_bytes) for span in group if span.file is not None)
            for window in self._direct.windows(ranges):
                for start in range(0, len(window), BLOCK_BYTES):
                    yield window[start : start + BLOCK_BYTES]

    def _buffered(self, spans: Iterable[Span]) -> Iterator[memoryview]:
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
        file, offset = self._files.get(span.file), span.offset + done
        while out:
            count = os.preadv(file, [out], offset)
            if not count:
                raise ConversionError(
                    "a file became shorter while it was read", [Problem(str(span.file), found=f"{offset} bytes")]
                )
            out, offset = out[count:], offset + count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.__exit__()
        if self._direct is not None:
            self._direct.__exit__()
