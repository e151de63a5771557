"""Files that are read again and again: the last few stay open. No torch here."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Self

MAX_OPEN_FILES = 64


class OpenFiles:
    """Descriptors by path and way of opening.

    Args:
        reads_ahead: Whether the kernel may bring what follows a read into the page cache.
    """

    def __init__(self, *, reads_ahead: bool = True) -> None:
        self._reads_ahead = reads_ahead
        self._files: OrderedDict[tuple[Path, int], int] = OrderedDict()

    def get(self, path: Path, flags: int = 0) -> int:
        """A descriptor for reading; good until the next one is asked for.

        Args:
            path: The file.
            flags: Of open(2), beside `O_RDONLY`.
        """
        key = (path, flags)
        if key not in self._files:
            if len(self._files) == MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[key] = os.open(path, os.O_RDONLY | flags)
            if not self._reads_ahead:
                os.posix_fadvise(self._files[key], 0, 0, os.POSIX_FADV_RANDOM)
        self._files.move_to_end(key)
        return self._files[key]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._files:
            os.close(self._files.popitem()[1])
