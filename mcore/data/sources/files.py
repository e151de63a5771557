"""Local files and folders of rows: what kind each is, and a reader for each kind.

A folder stands for all files of rows in it, in the order of their paths, and these must be of one kind.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mcore.data.sources import lines, tables
from mcore.data.sources.self_cognition import vary
from mcore.errors import DataError, Problem

Records = Callable[[Path, "array[int]", int, int], Iterator[Any]]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of file.

    Attributes:
        index: Number of rows, and what `records` needs to begin anywhere.
        records: Rows of a range, each what the file holds or a `RowError`.
        mark: Between the file and the number of a row in its place: a row of a line is `file:line`.
    """

    index: Callable[[Path], tuple[int, array[int]]]
    records: Records
    mark: str


def _json_index(path: Path) -> tuple[int, array[int]]:
    return len(tables.json_rows(path)), array("q")


KINDS = {
    "jsonl": Kind(lines.index, lines.json_records, ":"),
    "txt": Kind(lines.index, lines.text_records, ":"),
    "json": Kind(_json_index, tables.json_records, "#"),
    "csv": Kind(tables.csv_index, tables.csv_records, "#"),
    "parquet": Kind(tables.parquet_index, tables.parquet_records, "#"),
}
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
            ".txt": "txt"}  # fmt: skip
NO_ROWS = frozenset({"dataset_infos.json", "dataset_info.json", "README.txt", "LICENSE.txt", "requirements.txt"})
"""Files beside the rows in folders of data sets."""


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a source, and what its reader needs to begin anywhere in it.

    Attributes:
        path: The file.
        name: The file as places name it.
        kind: A key of `KINDS`.
        num_rows: How many rows it has, broken ones among them.
        starts: What the reader of its kind remembers.
        variant: What its rows are made into (`mcore.data.sources.self_cognition`); empty for what they are.
    """

    path: Path
    name: str
    kind: str
    num_rows: int
    starts: array[int] = field(repr=False)
    variant: str = ""

    def read(self, start: int, stop: int) -> Iterator[tuple[str, Any]]:
        """Place of each row from `start` to `stop`, and what the file holds there or a `RowError`."""
        kind = KINDS[self.kind]
        for number, data in enumerate(kind.records(self.path, self.starts, start, stop), start=start + 1):
            is_varied = self.variant and isinstance(data, dict)
            yield f"{self.name}{kind.mark}{number}", vary(data, self.variant) if is_varied else data


def suffix_kind(path: Path) -> str | None:
    """The kind that a file's name says; None if it says none."""
    packed = path.suffix in lines.PACKED
    kind = SUFFIXES.get(path.with_suffix("").suffix if packed else path.suffix)
    return None if packed and kind not in ("jsonl", "txt") else kind


def files_of(path: Path) -> list[Path]:
    """The files of rows that a path stands for: itself, or those of a folder.

    Raises:
        DataError: There are none, or a folder has some of several kinds.
    """
    if not path.is_dir():
        return [path]
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and suffix_kind(file) and file.name not in NO_ROWS
        if not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    kinds = sorted({str(suffix_kind(file)) for file in found})
    if len(kinds) != 1:
        wanted = f"files of rows of one kind ({', '.join(KINDS)})"
        fix = "Name the files one by one." if kinds else ""
        raise DataError("the data can't be used", [Problem(str(path), wanted, " and ".join(kinds) or "none", fix)])
    return found


def open_file(path: Path, name: str) -> Part:
    """A file of rows, looked through.

    Args:
        path: The file.
        name: What its rows' places begin with.

    Raises:
        DataError: It is missing, empty, damaged, or of no known kind.
    """
    kind = suffix_kind(path)
    if kind is None:
        found = "a name with another ending" if path.exists() else "No such file or directory"
        problem = Problem(
            name, f"a file ({', '.join(KINDS)}; jsonl and txt also .gz, .zst), or a folder of them", found
        )
        raise DataError("the data can't be used", [problem])
    try:
        kind = "jsonl" if kind == "json" and _is_json_lines(path) else kind
        num_rows, starts = KINDS[kind].index(path)
    except DataError:
        raise
    except OSError as exc:
        raise _unreadable(name, kind, exc.strerror or str(exc)) from exc
    except Exception as exc:  # pyarrow has an error tree of its own
        if type(exc).__module__.partition(".")[0] != "pyarrow":
            raise
        raise _unreadable(name, kind, str(exc).splitlines()[0]) from exc
    if not num_rows:
        raise DataError("the data can't be used", [Problem(name, "at least one row", "an empty file")])
    return Part(path, name, kind, num_rows, starts)


def _unreadable(name: str, kind: str, found: str) -> DataError:
    return DataError("the data can't be used", [Problem(name, f"a {kind} file", found)])


def _is_json_lines(path: Path) -> bool:
    """Whether a json file is jsonl, as many are that were written by pandas or lie on a hub."""
    with path.open("rb") as file:
        line = file.readline().strip()
        while not line and (more := file.readline()):
            line = more.strip()
    if not line.startswith(b"{"):
        return False
    try:
        first = json.loads(line)
    except ValueError:
        return False
    return not isinstance(first.get("data"), list)
