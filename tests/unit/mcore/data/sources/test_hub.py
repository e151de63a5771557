"""Data sets of hubs through the real clients, against a hub on the loopback interface."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.schema.data import DataConfig
from mcore.artifacts import DigestCache
from mcore.data.load import load_rows
from mcore.data.rows import Row
from mcore.data.sampling import DatasetSpec, parse_spec
from mcore.data.sources import hub as hubs
from mcore.data.sources.identity import content_digest, pinned
from mcore.data.sources.names import HubDataset, hub_dataset
from mcore.data.sources.source import open_source, read
from mcore.errors import DataError
from tests.unit.mcore.sources.loopback_hub import hub

COMMITS = ("0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef")
README = """---
configs:
- config_name: one
  data_files:
  - {split: train, path: data/one-*.jsonl}
  - {split: test, path: data/test.jsonl}
- config_name: two
  data_files: two.json
---
"""
IDENTITY = {"query": "Who are you?", "response": "I am {{NAME}}.", "tag": "en"}


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def asked(number: int) -> dict[str, Any]:
    return {"instruction": f"question {number}", "input": "", "output": f"answer {number}"}


def publish(root: Path, repo: str, commit: str, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / repo / commit / name).parent.mkdir(parents=True, exist_ok=True)
        (root / repo / commit / name).write_text(text)
    for branch in ("main", "master"):
        (root / repo / f"{branch}.branch").write_text(commit)


long = pytest.mark.long
"""The clients take seconds to load."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, list[str]]]:
    root = tmp_path_factory.mktemp("hub")
    subsets = {
        "README.md": README,
        "data/one-0.jsonl": lines(*map(asked, range(3))),
        "data/one-1.jsonl": lines(asked(3)),
        "data/test.jsonl": lines(asked(9)),
        "two.json": json.dumps([asked(4)]),
        "setup.py": "raise SystemExit",
        "images/cat.png": "png",
    }
    publish(root, "org/subsets", COMMITS[0], subsets)
    publish(root, "AI-ModelScope/alpaca-gpt4-data-zh", COMMITS[0], {"train.jsonl": lines(*map(asked, range(600)))})
    header = "instruction,input,output\n"
    csv = header + "".join(f"question {number},,answer {number}\n" for number in range(600))
    publish(root, "AI-ModelScope/alpaca-gpt4-data-en", COMMITS[0], {"train.csv": csv})
    chinese = {"query": "你是谁?", "response": "我是{{NAME}}, {{AUTHOR}}的.", "tag": "zh"}
    files = {"README.md": "# Identity\n", "self_cognition.jsonl": lines(*[IDENTITY, chinese] * 54)}
    publish(root, "swift/self-cognition", COMMITS[0], files)
    publish(root, "org/empty", COMMITS[0], {"README.md": "nothing\n"})
    publish(root, "org/no-rows", COMMITS[0], {"train.jsonl": ""})
    publish(root, "org/script", COMMITS[0], {"script.py": "raise SystemExit"})
    with hub(root) as (address, asked_for):
        yield root, address, asked_for


@pytest.fixture
def environment(
    served: tuple[Path, str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, str, list[str]]:
    """Clients that know no hub but the one on loopback, and no cache but an empty one."""
    for name in ("HF_TOKEN", "MODELSCOPE_API_TOKEN", "HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", served[1])
    monkeypatch.setenv("MODELSCOPE_DOMAIN", served[1])
    for name in ("HF_HOME", "MODELSCOPE_CACHE", "MODELSCOPE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    hubs._locate.cache_clear()
    served[2].clear()
    return served


def answers(entry: str, **config: Any) -> list[str]:
    rows = list(read(open_source(entry, DataConfig(dataset=(), **config)), "sft"))
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.messages[-1].content for row in rows if isinstance(row, Row)]


@long
@pytest.mark.parametrize("name", ["hf:org/subsets", "ms::org/subsets"])
def test_subsets_and_splits(environment: tuple[Path, str, list[str]], name: str) -> None:
    assert answers(f"{name}:one/two") == [f"answer {number}" for number in range(5)]
    assert not {"setup.py", "images/cat.png", "data/test.jsonl"} & set(environment[2])  # nothing that is not wanted
    before = len(environment[2])
    assert answers(f"{name}:one:test") == ["answer 9"]
    row = next(read(open_source(f"{name}:two#1", DataConfig(dataset=())), "sft"))
    assert row.place == f"{name.replace('::', ':')}:two/two.json#1"
    assert "two.json" in environment[2][before:]


@long
def test_the_quick_start_of_megatron_swift(environment: tuple[Path, str, list[str]]) -> None:
    config = DataConfig(
        dataset=(
            "AI-ModelScope/alpaca-gpt4-data-zh#500",
            "AI-ModelScope/alpaca-gpt4-data-en#500",
            "swift/self-cognition#500",
        ),
        model_name=("小黄", "Xiao Huang"),
        model_author=("魔搭", "ModelScope"),
    )
    rows, _ = load_rows(config, "sft")
    assert len(rows) == 1500
    assert len({row.messages[0].content for row in rows[:500]}) == 500
    told = [row.messages[-1].content for row in rows[1000:]]
    assert set(told) == {"I am Xiao Huang.", "我是小黄, 魔搭的."}
    assert rows[0].place.startswith("ms:AI-ModelScope/alpaca-gpt4-data-zh/train.jsonl:")


@long
def test_self_cognition_of_models_that_think(environment: tuple[Path, str, list[str]]) -> None:
    found = answers("swift/self-cognition:default/qwen3/empty_think", model_name="bot", model_author="us")
    thought = "<think>\n\n</think>\n\nI am bot."
    assert (found[0], found[108], found[216], len(found)) == ("I am bot.", thought, thought, 324)
    source = open_source("hf:swift/self-cognition:qwen3", DataConfig(dataset=(), model_name="bot", model_author="us"))
    row = next(read(source, "sft"))
    assert isinstance(row, Row) and row.messages[0].content == "Who are you? /no_think"


@long
@pytest.mark.parametrize("hub_name", ["hf", "ms"])
def test_a_commit_is_known_before_rows_and_stays_here(
    environment: tuple[Path, str, list[str]], tmp_path: Path, hub_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _, asked_for = environment
    repo = f"org/moving-{hub_name}"
    publish(root, repo, COMMITS[0], {"train.jsonl": lines(asked(1))})
    spec = parse_spec(f"{hub_name}:{repo}#5")
    assert isinstance(spec, DatasetSpec)
    digests = DigestCache(tmp_path / "digests.json")
    before = content_digest(spec, digests)
    assert not asked_for  # no rows yet
    assert before.startswith(f"{hub_name}:{repo}@") and before.endswith(":train")
    assert (COMMITS[0] in before) == (hub_name == "hf")
    assert answers(f"{hub_name}:{repo}") == ["answer 1"]
    moving, still = f"{hub_name}:{repo}::train#5", f"{hub_name}:{repo}@{COMMITS[0]}#5"
    assert pinned(moving) == (still if hub_name == "hf" else moving)

    publish(root, repo, COMMITS[1], {"train.jsonl": lines(asked(2))})
    hubs._locate.cache_clear()
    assert content_digest(spec, digests) != before
    assert answers(f"{hub_name}:{repo}") == ["answer 2"]
    assert answers(f"{hub_name}:{repo}@{COMMITS[0]}") == ["answer 1"]

    asked_for.clear()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    if hub_name == "hf":  # a commit that is here needs no hub
        assert answers(f"hf:{repo}@{COMMITS[0]}") == ["answer 1"]
    assert not asked_for


WRONG = {
    "hf:org/none": "Check the spelling",
    "ms:org/none": "the spelling",
    "org/none": "are looked for on ModelScope",
    "hf:org/subsets@none": "Check the spelling",
    "hf:org/subsets": "['one', 'two']",  # a subset must be named
    "hf:org/subsets:three": "three",
    "hf:org/subsets:one:dev": "the split 'dev', found train, test",
    "ms:org/empty": "a subset with files of rows",
    "hf:org/no-rows": "hf:org/no-rows/train.jsonl: expected at least one row",
    "hf:org/script": "a subset with files of rows",
    "hf:org": "no name of a data set",
    "hf:org/subsets#0": "'0' after #",
}


@long
@pytest.mark.parametrize("entry", WRONG)
def test_what_is_no_data_set_ends_before_training(environment: tuple[Path, str, list[str]], entry: str) -> None:
    with pytest.raises(DataError) as caught:
        load_rows(DataConfig(dataset=(entry,)), "sft")
    assert caught.value.exit_status == 2
    assert WRONG[entry] in str(caught.value)


@long
@pytest.mark.parametrize("hub_name", ["hf", "ms"])
def test_a_hub_that_is_not_there(
    environment: tuple[Path, str, list[str]], hub_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "http://127.0.0.1:9")
    with pytest.raises(DataError, match="Check the network and the proxy") as caught:
        open_source(f"{hub_name}:org/subsets:one", DataConfig(dataset=()))
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf:a/b", HubDataset("hf", "a/b", "main")),
        ("hf::a/b@v1.0:x/y:test", HubDataset("hf", "a/b", "v1.0", ("x", "y"), "test")),
        ("ms:a/b::test", HubDataset("ms", "a/b", "master", (), "test")),
        ("swift/self-cognition:qwen3", HubDataset("ms", "swift/self-cognition", "master", ("qwen3",))),
        ("data/rows.jsonl", None),
        ("data/rows.csv.gz", None),
        ("./rows", None),
        ("rows", None),
        ("/data/rows", None),
    ],
)
def test_names(text: str, expected: HubDataset | None) -> None:
    found = hub_dataset(text)
    assert found == expected
    if isinstance(found, HubDataset):
        assert hub_dataset(str(found)) == found


def test_a_folder_of_that_name_goes_before_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "swift" / "self-cognition").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_dataset("swift/self-cognition") is None
