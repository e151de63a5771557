"""A prepared folder: the rows that a run takes, in their order, and what became of the others."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.schema.data import DataConfig
from mcore.data.dataset import TokenDataset, open_datasets
from mcore.data.load import load_rows
from mcore.data.prepare import select
from mcore.data.prepare.build import prepare
from mcore.data.prepare.digests import ASKED_FILE, asked_alike, digests_of
from mcore.data.prepare.report import REPORT_FILE
from mcore.data.template import encode_rows, load_tokenizer
from mcore.errors import ConfigError, DataError
from tests.unit.mcore.data.tokenizers_for_tests import write_hf_dir

WORDS = ("the", "small", "red", "model", "learns", "to", "answer", "short", "questions", "about", "world")


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_dir(tmp_path_factory.mktemp("hf"), "chatml")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few rows make several parts, and the last one is not full."""
    monkeypatch.setattr(select, "ROWS_AT_ONCE", 8)


def row(user: str, answer: str) -> str:
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}) + "\n"


def write(path: Path, num_rows: int, seed: int = 0, copies: int = 1) -> Path:
    """Rows of many lengths, each `copies` times in a row."""
    draw = random.Random(seed)
    made = [row(f"Question {n}?", " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))) for n in range(num_rows)]
    path.write_text("".join(line for line in made for _ in range(copies)))
    return path


def in_memory(config: DataConfig, hf_dir: Path) -> list[TokenDataset]:
    """The samples by lists of all rows, as the reference."""
    tokenizer = load_tokenizer(hf_dir)
    datasets = []
    for rows, shuffle in zip(load_rows(config, "sft"), (config.dataset_shuffle, False), strict=True):
        samples, problems = encode_rows(rows, tokenizer, "sft")
        assert not problems
        datasets.append(TokenDataset(samples, seed=config.data_seed, shuffle=shuffle))
    return datasets


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    "settings",
    [
        {"dataset": ["one"]},
        {"dataset": ["one#5", "two", "one#53"], "val_dataset": ["two#4"]},
        {"dataset": ["two#30", "one#7"], "dataset_shuffle": False},
        {"dataset": ["one", "copies"], "split_dataset_ratio": 0.3},
        {"dataset": ["copies#40"], "split_dataset_ratio": 0.2, "dataset_shuffle": False},
    ],
)
def test_samples_and_order_are_those_of_rows_in_memory(tmp_path: Path, hf_dir: Path, settings: dict[str, Any]) -> None:
    for name, num_rows, copies in (("one", 21, 1), ("two", 10, 1), ("copies", 6, 3)):
        write(tmp_path / f"{name}.jsonl", num_rows, seed=num_rows, copies=copies)
    for field in ("dataset", "val_dataset"):
        entries = [entry.partition("#") for entry in settings.get(field, [])]
        settings = {**settings, field: [f"{tmp_path / name}.jsonl{mark}{count}" for name, mark, count in entries]}
    config = DataConfig.model_validate(settings)
    prepare(config, "sft", hf_dir, tmp_path / "data")
    for found, expected in zip(open_datasets(tmp_path / "data"), in_memory(config, hf_dir), strict=True):
        assert found.fingerprint == expected.fingerprint and found.describe() == expected.describe()
        assert [sample.place for sample in found] == [sample.place for sample in expected]
        assert [list(sample.token_ids) for sample in found] == [list(sample.token_ids) for sample in expected]
        assert [list(sample.loss_mask) for sample in found] == [list(sample.loss_mask) for sample in expected]
        if len(found):
            assert found.order(1) == expected.order(1)
            again = TokenDataset(list(found), seed=found.seed, shuffle=found.shuffle)
            assert again.fingerprint == found.fingerprint  # which is read from a file


@pytest.mark.usefixtures("small_parts")
def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path, hf_dir: Path) -> None:
    write(tmp_path / "rows.jsonl", 75)
    (tmp_path / "broken.jsonl").write_text(row("q", "a") + "{\n" + row("r", "") + row("s", "b"))
    config = DataConfig(
        dataset=(str(tmp_path / "rows.jsonl"), f"{tmp_path / 'broken.jsonl'}#9"),
        split_dataset_ratio=0.1,
        max_dropped_rows=2,
    )
    for num_proc in (1, 3):
        prepare(config, "sft", hf_dir, tmp_path / str(num_proc), num_proc=num_proc)
    one, three = (
        {path.name: path.read_bytes() for path in (tmp_path / str(num_proc)).iterdir()} for num_proc in (1, 3)
    )
    assert one == three and len(one) == 7


def test_dropped_rows_are_counted_told_and_limited(tmp_path: Path, hf_dir: Path) -> None:
    good = [row(f"Question {n}?", "answer") for n in range(4)]
    bad = ["\n", "{\n", '{"text": "no messages"}\n', row("a <|im_start|> b", "mark"), "[]\n", "{\n"]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join([*good[:2], *bad, *good[2:]]))
    config = DataConfig(dataset=(str(path),), max_dropped_rows=6)
    report = prepare(config, "sft", hf_dir, tmp_path / "data")
    assert report == json.loads((tmp_path / "data" / REPORT_FILE).read_text())
    counts = {reason: found["count"] for reason, found in report["dropped"].items()}
    assert sum(counts.values()) == 6 and counts["not_json"] == 2 and counts["template"] == 1
    assert [text.partition(": ")[0] for text in report["dropped"]["not_json"]["examples"]] == [f"{path}:4", f"{path}:8"]
    assert report["sources"] == [{"name": str(path), "rows": 10, "taken": 10, "used": 4}]
    assert (report["rows"], report["samples"]) == (10, 4)
    with pytest.raises(DataError) as caught:
        prepare(config.model_copy(update={"max_dropped_rows": 5}), "sft", hf_dir, tmp_path / "none")
    told = [str(problem) for problem in caught.value.problems]
    assert "at most 5 rows left out (data.max_dropped_rows), found 6" in told[0] and len(told) == 7
    assert caught.value.exit_status == 2 and not list(tmp_path.glob("none*"))


def test_a_value_that_the_run_lacks_is_no_fault_of_the_rows(tmp_path: Path, hf_dir: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(row("Who?", "I am {{NAME}}.") * 3 + row("Who?", "A bot."))
    with pytest.raises(DataError) as caught:
        prepare(DataConfig(dataset=(str(path),), max_dropped_rows=100), "sft", hf_dir, tmp_path / "data")
    assert [str(problem) for problem in caught.value.problems] == [
        f"{path}: 3 rows hold {{{{NAME}}}} (first: line 1): expected data.model_name to be set, found nothing"
    ]


def test_the_report_finds_copies_and_rows_on_both_sides(tmp_path: Path, hf_dir: Path) -> None:
    write(tmp_path / "train.jsonl", 10, copies=2)
    (tmp_path / "val.jsonl").write_text(
        "".join((tmp_path / "train.jsonl").read_text().splitlines(keepends=True)[4:6]) + row("new", "new")
    )
    config = DataConfig(dataset=(f"{tmp_path}/train.jsonl#60",), val_dataset=(f"{tmp_path}/val.jsonl",))
    report = prepare(config, "sft", hf_dir, tmp_path / "data")
    assert report["duplicates"] == 10  # rows of the file; that they are drawn three times is the run's wish
    assert report["overlap_with_validation"] == 1
    train, validation = open_datasets(tmp_path / "data")
    assert (len(train), len(validation)) == (60, 3) == (report["samples"], report["validation_samples"])
    assert report["tokens"] == sum(len(sample.token_ids) for sample in train)
    assert report["trained_tokens"] == sum(int((np.asarray(sample.loss_mask) > 0).sum()) for sample in train)
    assert sum(report["lengths"].values()) == 60
    asked = np.load(tmp_path / "data" / ASKED_FILE)
    assert len(asked) == 10  # those of validation are not among them
    assert (asked == digests_of([asked_alike("QUESTION  3?")])[0]).all(axis=1).any()


def test_a_sample_that_is_too_long_is_no_dropped_row(tmp_path: Path, hf_dir: Path) -> None:
    path = write(tmp_path / "rows.jsonl", 20)
    whole = prepare(DataConfig(dataset=(str(path),)), "sft", hf_dir, tmp_path / "whole")
    limited = DataConfig(dataset=(str(path),), max_length=whole["longest"] - 1, truncation_strategy="delete")
    report = prepare(limited, "sft", hf_dir, tmp_path / "limited")
    assert report["dropped"] == {} and report["over_length"]["left_out"] >= 1
    assert report["samples"] + report["over_length"]["left_out"] == 20


def test_what_is_no_prepared_folder_is_refused(tmp_path: Path, hf_dir: Path) -> None:
    config = DataConfig(dataset=(str(write(tmp_path / "rows.jsonl", 5)),))
    prepare(config, "sft", hf_dir, tmp_path / "data")
    for name in ("samples.arrow", "train.arrow", "datasets.json"):
        whole = (tmp_path / "data" / name).read_bytes()
        (tmp_path / "data" / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match="prepared data can't be read"):
            open_datasets(tmp_path / "data")
        (tmp_path / "data" / name).write_bytes(whole)
    assert len(open_datasets(tmp_path / "data")[0]) == 5
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="no place"):
        prepare(config, "sft", hf_dir, tmp_path / "file" / "data")
