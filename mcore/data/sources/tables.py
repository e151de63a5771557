"""Files of records that are no lines: json, csv, tsv and parquet."""

from __future__ import annotations

import csv
import json
import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mcore.data.rows import RowError
from mcore.data.sources.lines import STRIDE, DuplicateKeyError, without_duplicates
from mcore.errors import DataError, Problem

if TYPE_CHECKING:
    from pyarrow import RecordBatch

MAX_JSON_BYTES = 512 * 1024**2
"""A json file is read as a whole, which takes several times its size."""

STRUCTURED = frozenset({
    "messages", "conversations", "history", "tools", "prompt", "completion", "chosen", "rejected", "rejected_response",
    "rejected_messages", "label", "chat_template_kwargs",
})  # fmt: skip
"""Columns whose csv cells are JSON where they can be read as such; cells of all others are text."""


def json_rows(path: Path) -> list[Any]:
    """The rows of a json file: a list, or the list under `data`.

    Raises:
        DataError: It is too large, can't be read, or holds no list.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        limit = f"at most {MAX_JSON_BYTES // 1024**2} MiB, since a json file is read as a whole"
        raise _refused(path, limit, f"{size // 1024**2} MiB", "Write it as jsonl.")
    return _json_rows(path, size, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _json_rows(path: Path, _size: int, _mtime_ns: int) -> list[Any]:
    wanted = 'a list of rows, or {"data": [...]}'
    try:
        data = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=without_duplicates)
    except UnicodeDecodeError as exc:
        raise _refused(path, "UTF-8", f"byte at {exc.start}") from exc
    except (DuplicateKeyError, ValueError, RecursionError) as exc:
        raise _refused(path, wanted, str(exc)) from exc
    rows = data.get("data") if isinstance(data, dict) else data
    if not isinstance(rows, list):
        found = f"an object with {', '.join(data) or 'no key'}" if isinstance(data, dict) else type(data).__name__
        raise _refused(path, wanted, found)
    return rows


def json_records(path: Path, starts: array[int], start: int, stop: int) -> Iterator[Any]:
    """Rows `start` to `stop` of a json file."""
    yield from json_rows(path)[start:stop]


def csv_index(path: Path) -> tuple[int, array[int]]:
    """Number of records of a csv file behind its header, and where every `STRIDE`-th of them begins (bytes).

    Raises:
        DataError: The header is none.
    """
    starts = array("q")
    number = 0
    with path.open("rb") as file:
        records = _CsvRecords(path, file)
        names = records.header
        if not names or len(set(names)) < len(names) or not all(names):
            raise _refused(path, "a header: names of columns, each once", ", ".join(names) or "nothing")
        while True:
            at = records.at
            try:
                next(records)
            except StopIteration:
                return number, starts
            if number % STRIDE == 0:
                starts.append(at)
            number += 1


def csv_records(path: Path, starts: array[int], start: int, stop: int) -> Iterator[Any]:
    """Records `start` to `stop` of a csv file, or the `RowError` of one that is none. Cells are text; empty ones are
    left out.
    """
    with path.open("rb") as file:
        records = _CsvRecords(path, file)
        records.go_to(starts[start // STRIDE])
        for cells in islice(records, start % STRIDE, start % STRIDE + stop - start):
            yield cells if isinstance(cells, RowError) else _csv_row(records.header, cells)


class _CsvRecords(Iterator["list[str] | RowError"]):
    """Records of a csv file with the place where the next begins: a record may go over several lines."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        csv.field_size_limit(sys.maxsize)
        self._file = file
        self._delimiter = "\t" if path.suffix == ".tsv" else ","
        self.at = 0
        self._reader = self._from_here()
        header = next(self, [])
        self.header = [] if isinstance(header, RowError) else [name.removeprefix("\ufeff") for name in header]

    def go_to(self, at: int) -> None:
        self.at = at
        self._file.seek(at)
        self._reader = self._from_here()

    def _from_here(self) -> Iterator[list[str]]:
        return csv.reader(self._lines(), delimiter=self._delimiter, strict=True)

    def _lines(self) -> Iterator[str]:
        for line in self._file:
            self.at += len(line)
            yield line.decode("utf-8", errors="surrogateescape")

    def __next__(self) -> list[str] | RowError:
        try:
            return next(self._reader)
        except csv.Error as exc:
            return RowError("not_csv", "", "one record of csv", str(exc))


def _csv_row(header: list[str], cells: list[str]) -> dict[str, Any] | RowError:
    if not cells:
        return RowError("empty_line", "", "one record of csv", "an empty line", "Remove the line.")
    if len(cells) != len(header):
        return RowError("wrong_columns", "", f"{len(header)} cells, as in the header", str(len(cells)))
    if any("\udc80" <= letter <= "\udcff" for cell in cells if not cell.isascii() for letter in cell):
        return RowError("not_utf8", "", "UTF-8", "other bytes")
    return {name: _csv_cell(name, cell) for name, cell in zip(header, cells, strict=True) if cell}


def _csv_cell(name: str, cell: str) -> Any:
    if name not in STRUCTURED:
        return cell
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    return value if name == "label" or isinstance(value, list | dict) else cell


def parquet_index(path: Path) -> tuple[int, array[int]]:
    """Number of rows of a parquet file, and at which row each of its groups begins."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        starts = array("q")
        number = 0
        for group in range(file.num_row_groups):
            starts.append(number)
            number += file.metadata.row_group(group).num_rows
        return number, starts


def parquet_records(path: Path, starts: array[int], start: int, stop: int) -> Iterator[Any]:
    """Rows `start` to `stop` of a parquet file. Columns that are null are left out."""
    for at, batch in _batches(path, starts, start, stop):
        wanted = batch.slice(max(0, start - at), stop - max(start, at))
        for row in wanted.to_pylist():
            yield {name: value for name, value in row.items() if value is not None}


_left_off: dict[Path, tuple[int, RecordBatch, Iterator[RecordBatch]]] = {}
"""A group can't be entered in the middle, and may hold all rows: where this process stopped reading one, it goes on."""


def _batches(path: Path, starts: array[int], start: int, stop: int) -> Iterator[tuple[int, RecordBatch]]:
    """Batches that hold rows `start` to `stop`, each with the number of its first row."""
    if start >= stop:
        return
    group = bisect_right(starts, start) - 1
    kept = _left_off.pop(path, None)
    if kept is not None and starts[group] <= kept[0] <= start:
        at, batch, batches = kept
    else:
        at, batches = starts[group], _from_group(path, range(group, len(starts)))
        batch = next(batches)
    while True:
        if at + batch.num_rows > start:
            yield at, batch
        if at + batch.num_rows >= stop:
            break
        at, batch = at + batch.num_rows, next(batches)
    _left_off.clear()
    _left_off[path] = at, batch, batches


def _from_group(path: Path, groups: range) -> Iterator[RecordBatch]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=STRIDE, row_groups=list(groups))


def _refused(path: Path, expected: str, found: str, fix: str = "") -> DataError:
    return DataError("the data can't be used", [Problem(str(path), expected, found, fix)])
