"""Files of lines: jsonl holds one JSON object a line, txt one document a line; both may be packed (`.gz`, `.zst`).

Lines end at line feeds only, as JSON Lines has it.
"""

from __future__ import annotations

import io
import json
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

from mcore.data.rows import RowError

STRIDE = 256
"""Lines between two places that the index remembers: 32 KB of them for a million lines."""

PACKED = {".gz": "gzip", ".zst": "zstd"}


def index(path: Path) -> tuple[int, array[int]]:
    """Number of lines of a file, and where every `STRIDE`-th of them begins (bytes, once unpacked)."""
    starts = array("q")
    at = number = 0
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if number % STRIDE == 1:
                starts.append(at)
            at += len(line)
    return number, starts


def json_records(path: Path, starts: array[int], start: int, stop: int) -> Iterator[Any]:
    """What lines `start` to `stop` hold (counted from 0), or the `RowError` of a line that holds nothing."""
    for line in _lines(path, starts, start, stop):
        try:
            yield decode(line)
        except RowError as exc:
            yield exc


def text_records(path: Path, starts: array[int], start: int, stop: int) -> Iterator[Any]:
    """`{"text": line}` of lines `start` to `stop`, or the `RowError` of a line that holds nothing."""
    for line in _lines(path, starts, start, stop):
        try:
            yield {"text": _text(line)} if line.strip() else RowError("empty_line", "", "a document", "an empty line")
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
        return json.loads(_text(line), object_pairs_hook=without_duplicates)
    except DuplicateKeyError as exc:
        raise RowError("duplicate_key", "", "one JSON object", str(exc)) from exc
    except (ValueError, RecursionError) as exc:
        raise RowError("not_json", "", "one JSON object", str(exc)) from exc


def _text(line: bytes) -> str:
    try:
        return line.rstrip(b"\r\n").decode("utf-8")
    except UnicodeDecodeError as exc:
        raise RowError("not_utf8", "", "UTF-8", f"byte 0x{line[exc.start]:02x} at {exc.start}") from exc


class DuplicateKeyError(ValueError):
    """A JSON object has a key twice, so that one of the two values would be lost."""


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `object_pairs_hook`.

    Raises:
        DuplicateKeyError: It has a key twice.
    """
    data = dict(pairs)
    if len(data) != len(pairs):
        names = [name for name, _ in pairs]
        raise DuplicateKeyError(f"the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return data


def _open(path: Path) -> IO[bytes]:
    codec = PACKED.get(path.suffix)
    if codec is None:
        return path.open("rb")
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), codec))


_left_off: dict[Path, tuple[int, IO[bytes]]] = {}
"""Packed files can't be entered in the middle: where this process stopped reading one, it goes on."""


def _lines(path: Path, starts: array[int], start: int, stop: int) -> Iterator[bytes]:
    if path.suffix not in PACKED:
        with path.open("rb") as file:
            file.seek(starts[start // STRIDE])
            yield from islice(file, start % STRIDE, start % STRIDE + stop - start)
        return
    at, packed = _left_off.pop(path, (stop, None))
    if packed is None or at > start:
        at, packed = 0, _open(path)
    yield from islice(packed, start - at, stop - at)
    _left_off.clear()
    _left_off[path] = stop, packed
