"""Sources of every kind give the same rows, whole and by range; what can't be opened is named."""

from __future__ import annotations

import csv
import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from configs.schema.data import DataConfig
from mcore.artifacts import DigestCache
from mcore.data.rows import Dropped, Row
from mcore.data.sampling import DatasetSpec, parse_spec
from mcore.data.sources.identity import content_digest
from mcore.data.sources.source import Source, open_source, read
from mcore.errors import DataError

NUM_ROWS = 1000  # several strides of the index, and groups of parquet
ROWS = [{"query": f"question {n}\n, “{n}”", "response": f'answer "{n}"'} for n in range(NUM_ROWS)]
CONFIG = DataConfig(dataset=())


def as_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def as_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=1))


def as_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=300)


def as_one_group(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def packed(codec: str) -> Callable[[Path, list[dict[str, Any]]], None]:
    def write(path: Path, rows: list[dict[str, Any]]) -> None:
        as_jsonl(path, rows)
        with pyarrow.OSFile(str(path) + "~", "wb") as plain, pyarrow.CompressedOutputStream(plain, codec) as file:
            file.write(path.read_bytes())
        Path(str(path) + "~").rename(path)

    return write


WRITERS = {
    "rows.jsonl": as_jsonl,
    "rows.ndjson": as_jsonl,
    "lines.json": as_jsonl,
    "rows.json": as_json,
    "data.json": lambda path, rows: path.write_text(json.dumps({"version": 1, "data": rows})),
    "rows.csv": as_csv,
    "rows.tsv": as_csv,
    "rows.parquet": as_parquet,
    "one-group.parquet": as_one_group,
    "rows.jsonl.gz": packed("gzip"),
    "rows.jsonl.zst": packed("zstd"),
}


def contents(items: list[Row | Dropped]) -> list[tuple[str, ...]]:
    assert all(isinstance(item, Row) for item in items), [item for item in items if isinstance(item, Dropped)][:3]
    return [tuple(turn.content for turn in item.messages) for item in items if isinstance(item, Row)]


EXPECTED = [(row["query"], row["response"]) for row in ROWS]


@pytest.mark.parametrize("name", WRITERS)
def test_each_kind_gives_the_same_rows_whole_and_by_range(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, ROWS)
    source: Source = pickle.loads(pickle.dumps(open_source(f"{tmp_path / name}#7", CONFIG)))
    assert (source.num_rows, source.spec.num_rows) == (NUM_ROWS, 7)
    assert contents(list(read(source, "sft"))) == EXPECTED
    for start, stop in ((0, 1), (999, 1000), (255, 257), (256, 256), (299, 601), (512, 900), (900, 5000), (3, 4)):
        items = list(read(source, "sft", start, stop))
        assert contents(items) == EXPECTED[start:stop], (start, stop)
    in_pieces = [item for start in range(0, NUM_ROWS, 130) for item in read(source, "sft", start, start + 130)]
    assert contents(in_pieces) == EXPECTED
    mark = "#" if name.partition(".")[2] in ("json", "csv", "tsv", "parquet") and name != "lines.json" else ":"
    assert next(read(source, "sft", 41, 42)).place == f"{tmp_path / name}{mark}42"


def test_a_txt_file_holds_a_document_a_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_bytes("one\r\ntwo\u2028half\n\n  \nlast \xff".encode().replace(b"\xc3\xbf", b"\xff"))
    items = list(read(open_source(str(path), CONFIG), "pt"))
    assert [item.text for item in items if isinstance(item, Row)] == ["one", "two\u2028half"]
    found = [(item.reason, item.place) for item in items if isinstance(item, Dropped)]
    assert found == [("empty_line", f"{path}:3"), ("empty_line", f"{path}:4"), ("not_utf8", f"{path}:5")]


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    as_jsonl(tmp_path / "b" / "1.jsonl", ROWS[300:500])
    as_jsonl(tmp_path / "a.jsonl", ROWS[:300])
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROWS[500]).encode()))
    for name in ("README.md", "dataset_infos.json", ".hidden.jsonl"):
        (tmp_path / name).write_text("{}")
    source = open_source(str(tmp_path), CONFIG)
    assert source.num_rows == 501
    assert contents(list(read(source, "sft"))) == EXPECTED[:501]
    assert contents(list(read(source, "sft", 250, 350))) == EXPECTED[250:350]
    assert [row.place for row in read(source, "sft", 299, 301)] == [
        f"{tmp_path}/a.jsonl:300",
        f"{tmp_path}/b/1.jsonl:1",
    ]


def test_columns_of_csv_and_parquet_may_hold_structures(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "5"}, {"role": "assistant", "content": "6"}]
    as_csv(tmp_path / "rows.csv", [{"messages": json.dumps(turns), "id": 1}])
    as_csv(tmp_path / "texts.csv", [{"query": "5", "response": "[6]", "history": '[["3", "4"]]'}])
    calls = [{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]
    rows: list[dict[str, Any]] = [
        {"messages": turns},
        {"messages": [turns[0], {"role": "assistant", "content": None, "tool_calls": calls}]},
    ]
    as_parquet(tmp_path / "rows.parquet", rows)
    assert contents(list(read(open_source(str(tmp_path / "rows.csv"), CONFIG), "sft"))) == [("5", "6")]
    assert contents(list(read(open_source(str(tmp_path / "texts.csv"), CONFIG), "sft"))) == [("3", "4", "5", "[6]")]
    first, second = read(open_source(str(tmp_path / "rows.parquet"), CONFIG), "sft")
    assert contents([first, second]) == [("5", "6"), ("5", "")]
    assert isinstance(second, Row) and second.messages[1].tool_calls[0]["function"]["arguments"] == {"x": 1}


def test_broken_records_of_csv_are_named_and_the_next_go_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    lines = [b"query,response", b"a,b", b"a", b"a,b,c", b"", b'"a"x,b', b"\xff,b", b'"a\nb",c']
    path.write_bytes(b"\n".join(lines))
    items = list(read(open_source(str(path), CONFIG), "sft"))
    assert [item.reason if isinstance(item, Dropped) else "good" for item in items] == [
        "good",
        "wrong_columns",
        "wrong_columns",
        "empty_line",
        "not_csv",
        "not_utf8",
        "good",
    ]
    assert contents(items[-1:]) == [("a\nb", "c")]
    assert isinstance(items[2], Dropped) and str(items[2].problem).startswith(f"{path}#3: expected 2 cells")


UNREADABLE: dict[str, tuple[bytes | None, str]] = {
    "gone.jsonl": (None, "expected a jsonl file, found No such file"),
    "gone": (None, "found No such file"),
    "rows.xlsx": (b"x", "found a name with another ending"),
    "rows.csv.gz": (b"x", "found a name with another ending"),
    "rows.jsonl": (b"", "found an empty file"),
    "rows.json": (b"[]", "found an empty file"),
    "text.json": (b"hello", "expected a list of rows"),
    "cut.json": (b'[{"a": 1}', "expected a list of rows"),
    "object.json": (b'{"rows":\n []}', "found an object with rows"),
    "twice.json": (b'[{"a": 1, "a": 2}]', "the key 'a' twice"),
    "bytes.json": (b'["\xff"]', "expected UTF-8"),
    "rows.csv": (b"", "expected a header"),
    "header.csv": (b"a,b\n", "found an empty file"),
    "twice.csv": (b"a,a\n1,2\n", "expected a header"),
    "rows.parquet": (b"PAR1", "expected a parquet file"),
    "rows.jsonl.gz": (b"no gzip", "expected a jsonl file"),
    "rows.jsonl.zst": (b"no zstd", "expected a jsonl file"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_is_none_of_its_kind_is_named(tmp_path: Path, name: str) -> None:
    content, found = UNREADABLE[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_source(str(tmp_path / name), CONFIG)
    assert caught.value.exit_status == 2
    assert found in str(caught.value) and str(tmp_path / name) in str(caught.value)


def test_folders_of_no_kind_or_of_two(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found none"):
        open_source(str(tmp_path), CONFIG)
    as_jsonl(tmp_path / "a.jsonl", ROWS[:1])
    as_csv(tmp_path / "b.csv", ROWS[:1])
    with pytest.raises(DataError, match="found csv and jsonl"):
        open_source(str(tmp_path), CONFIG)


def test_what_a_source_holds_is_known_by_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    as_jsonl(folder / "a.jsonl", ROWS[:1])
    as_jsonl(folder / "b.jsonl", ROWS[1:2])
    digests = DigestCache(tmp_path / "digests.json")

    def digest(entry: Path | str) -> str:
        spec = parse_spec(str(entry))
        assert isinstance(spec, DatasetSpec)
        return content_digest(spec, digests)

    before = digest(folder)
    assert digest(f"{folder}#7") == before and digest(folder / "a.jsonl") == digests.digest(folder / "a.jsonl")
    folder.rename(tmp_path / "elsewhere")
    assert digest(tmp_path / "elsewhere") == before
    as_jsonl(tmp_path / "elsewhere" / "c.jsonl", ROWS[2:3])
    assert digest(tmp_path / "elsewhere") != before
