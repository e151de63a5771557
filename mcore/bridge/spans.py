"""Bytes that go from file to file as they are.

The bridge moves whole rows, so nearly all that it writes is a sequence of byte ranges of the files that it reads:
spans. They go through one small buffer, block by block. Nothing is mapped, as a mapped page counts as this process's
memory and costs a fault, and the buffer stays in the processor's cache, where a look at a block costs next to nothing.

No torch here.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from mcore.errors import ConversionError, Problem

BLOCK_BYTES = 2**20
"""Largest block. A multiple of every item's size, so that no number is cut in two."""
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
