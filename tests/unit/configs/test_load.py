"""Reading a run file: overrides, and every problem at once."""

import re
from pathlib import Path

import pytest
from rich.text import Text

from configs.schema.load import RunFileError, load_run, read_run_file
from configs.schema.run import RunConfig

RUN = """
name: test
model: {source: model}
data: {dataset: [rows.jsonl]}
train: {train_iters: 3, lr: 1e-4}
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def problems_of(path: Path, *overrides: str) -> dict[str, str]:
    with pytest.raises(RunFileError) as error:
        load_run(path, overrides)
    return dict(error.value.problems)


def test_a_run_file_becomes_a_run(run_file: Path) -> None:
    run = load_run(run_file)
    assert (run.name, run.data.dataset, run.train.lr, run.evaluate) == ("test", ("rows.jsonl",), 1.0e-4, None)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.lr=1e-5", 1.0e-5),
        ("train.lr=.5E-3", 5.0e-4),
        ("train.train_iters=7", 7),
        ("train.sequence_parallel=true", True),
        ("data.model_name=nan", "nan"),
        ('data.model_name="1e5"', "1e5"),
        ("data.system=a=b", "a=b"),
        ("data.system=null", None),
        ("data.dataset=[a.jsonl#5, b.jsonl]", ["a.jsonl#5", "b.jsonl"]),
    ],
)
def test_an_override_is_read_as_yaml(run_file: Path, override: str, value: object) -> None:
    group, field = override.partition("=")[0].split(".")
    found = read_run_file(run_file, [override])[group][field]
    assert found == value and type(found) is type(value)


def test_an_override_makes_the_group_it_names(run_file: Path) -> None:
    run_file.write_text(RUN + "evaluate:\n")
    overrides = ["evaluate.suite=suite.yaml", "launch.retries=0"]
    run = load_run(run_file, overrides)
    assert run.evaluate is not None and run.evaluate.suite == "suite.yaml"
    assert run.launch.retries == 0


def test_all_bad_overrides_are_named(run_file: Path) -> None:
    with pytest.raises(RunFileError) as error:
        read_run_file(run_file, ["lr", "=3", "name.first=x", "train.lr=[1"])
    assert [place for place, _ in error.value.problems] == [
        "--set lr",
        "--set =3",
        "--set name.first=x",
        "--set train.lr=[1",
    ]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("- a\n", "must hold a mapping, found list"),
        ("", "must hold a mapping, found NoneType"),
        ("a: [1\n", "is no YAML"),
        ("train: {lr: 1}\ntrain: {lr: 2}\n", "'train' is given twice"),
        ("train: {lr: 1, lr: 2}\n", "'lr' is given twice"),
        ("? [a, b]\n: 1\n", "is no YAML"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert what in problems_of(path)[str(path)]
    assert "\n" not in problems_of(path)[str(path)]


def test_a_missing_file_and_bytes_are_refused(tmp_path: Path) -> None:
    missing, binary = tmp_path / "none.yaml", tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00a")
    assert "No such file" in problems_of(missing)[str(missing)]
    assert "is no YAML" in problems_of(binary)[str(binary)]


def test_all_findings_come_at_once_with_suggestions(run_file: Path) -> None:
    found = problems_of(
        run_file,
        "name=Bad Name",
        "modle.source=x",
        "train.lrr=1",
        "train.max_length=64",
        "train.micro_batch_size=two",
        "train.lr=-1",
        "data.dataset=rows.jsonl",
        "evaluate.max_tokens=3",
        "select.zzz=1",
    )
    assert found == {
        "name": "string should match pattern '^[0-9a-z][0-9a-z_.-]{0,63}$', found 'Bad Name'",
        "modle": "unknown key; did you mean model?",
        "train.lrr": "unknown key; did you mean train.lr?",
        "train.max_length": "unknown key; did you mean data.max_length?",
        "train.micro_batch_size": "input should be a valid integer, unable to parse string as an integer, found 'two'",
        "train.lr": "input should be greater than 0, found -1",
        "data.dataset": "input should be a list, found 'rows.jsonl'",
        "evaluate.suite": "is missing",
        "select.zzz": "unknown key",
    }


def test_rich_shows_the_pattern_of_a_name_as_it_is() -> None:
    pattern = RunConfig.model_json_schema()["properties"]["name"]["pattern"]
    assert Text.from_markup(pattern).plain == pattern and re.fullmatch(pattern, "a_b.c-0")
