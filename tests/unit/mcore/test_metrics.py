"""metrics.jsonl: what a crash leaves is read, what will be logged again is dropped."""

import json
from pathlib import Path

from mcore.metrics import append_metrics, read_metrics, truncate_metrics


def test_records_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    records = [{"iteration": 1, "loss": 2.5, "mfu": None}, {"iteration": 1, "validation_loss": 2.0}]
    for record in records:
        append_metrics(path, record)
    assert read_metrics(path) == records


def test_every_cut_of_the_file_gives_a_prefix_of_its_records(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for iteration in range(1, 4):
        append_metrics(path, {"iteration": iteration, "loss": 1.0 / iteration, "note": "é"})
    content, records = path.read_bytes(), read_metrics(path)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        found = read_metrics(path)
        assert found == records[: len(found)]
        assert len(found) >= content[:length].count(b"\n")


def test_lines_that_are_no_records_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'\xff\xfe\n12\n[]\nnull\n{"loss": 1}\n{"iteration": "x"}\n\n{"iteration": 3, "loss": NaN}\n')
    (record,) = read_metrics(path)
    assert record["iteration"] == 3


def test_truncation_drops_what_will_be_logged_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for iteration in range(1, 6):
        append_metrics(path, {"iteration": iteration})
    with path.open("a") as file:
        file.write('{"iteration": 6, "lo')
    truncate_metrics(path, 3)
    append_metrics(path, {"iteration": 4})
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
