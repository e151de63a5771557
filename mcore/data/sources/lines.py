"""jsonl: one JSON object a line. Lines end at line feeds only, as JSON Lines has it."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mcore.data.rows import RowError

STRIDE = 256
"""Lines between two places that the index remembers: 32 KB of them for a million lines."""


def index(path: Path) -> tuple[int, array[int]]:
    """Number of lines of a file, and where every `STRIDE`-th of them begins (bytes)."""
    starts = array("q")
    at = number = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number % STRIDE == 1:
                starts.append(at)
            at += len(line)
    return number, starts


def records(path: Path, starts: array[int], start: int, stop: int) -> Iterator[Any]:
    """What lines `start` to `stop` hold (counted from 0), or the `RowError` of a line that holds nothing."""
    with path.open("rb") as file:
        file.seek(starts[start // STRIDE])
        for line in islice(file, start % STRIDE, start % STRIDE + stop - start):
            try:
                yield decode(line)
            except RowError as exc:
                yield exc


def decode(line: bytes) -> Any:
    """The JSON value of a line.

    Raises:
        RowError: It holds none.
    """
    if not line.strip():
        raise RowError("empty_line", "", "one JSON object", "an empty line", "Remove the line.")
    try:
        return json.loads(line.rstrip(b"\r\n").decode("utf-8"), object_pairs_hook=_without_duplicates)
    except UnicodeDecodeError as exc:
        raise RowError("not_utf8", "", "UTF-8", f"byte 0x{line[exc.start]:02x} at {exc.start}") from exc
    except _DuplicateKeyError as exc:
        raise RowError("duplicate_key", "", "one JSON object", str(exc)) from exc
    except (ValueError, RecursionError) as exc:
        raise RowError("not_json", "", "one JSON object", str(exc)) from exc


class _DuplicateKeyError(ValueError):
    pass


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKeyError(f"the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return data
