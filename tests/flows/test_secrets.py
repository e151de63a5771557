"""A planted secret is nowhere that a run writes, and a hostile path is but a path: real runs, also ones that fail."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flows import run_pipeline
from tests.flows.workspace import VLLM_PYTHON, make_workspace, raw_run
from tests.unit.flows.command_line import COMMAND, mcore_flows

pytestmark = pytest.mark.operations

SECRETS = {
    "HF_TOKEN": "hf_planted_4f1d",
    "MODELSCOPE_API_TOKEN": "ms_planted_77aa",
    "PREFECT_API_KEY": "pnu_planted_c0de",
    "WANDB_API_KEY": "wandb_planted_9b2e",
    "HTTPS_PROXY": "http://somebody:proxy_planted_1e5c@127.0.0.1:9",
}
PLANTED = b"_planted_"
FOLDER = "a b;$(touch ran)`touch ran`'\"&|<x>{y}%s\\\n* \u00fc -rf"
"""What a shell, a format string or a terminal would take for more than a name."""

TELLS_ALL = f"""#!/bin/sh
[ "$1" = -c ] && exec {VLLM_PYTHON} "$@"
env
echo "connecting to $HTTPS_PROXY with $HF_TOKEN" >&2
exit 1
"""
"""An interpreter that works until it is to evaluate, then prints its whole environment and fails, as libraries do."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A workspace in a folder of that name, where five runs were started."""
    top = tmp_path_factory.mktemp("secrets")
    folder = top / FOLDER
    folder.mkdir()
    make_workspace(folder)
    (folder / "tells all").write_text(TELLS_ALL)
    (folder / "tells all").chmod(0o755)
    (folder / "bad.jsonl").write_text(json.dumps({"messages": [{"role": "user"}]}) + "\n")
    here = {"launch": {"store": str(folder / "store")}}
    data = {"dataset": [f"{folder}/rows.jsonl#64"], "val_dataset": [f"{folder}/rows.jsonl"]}
    short = {"train": {"train_iters": 6, "save_steps": 3}, "evaluate": None, "model": {"source": str(folder / "model")}}
    good = {**here, "data": data, **short}
    runs = {
        "good": good,
        "unreachable": {**good, "model": {"source": "hf:somebody/some-model"}},
        "no-rows": {**good, "data": data | {"dataset": [f"{folder}/bad.jsonl"]}},
        "no-proof": {**good, "verify": {"max_relative_error": 1e-12}},
        "tells-all": {**good, "evaluate": {"python": str(folder / "tells all"), "suite": f"{folder}/suite.yaml"}},
    }
    for name, groups in runs.items():
        run_file = folder / f"{name}.json"  # YAML too
        run_file.write_text(json.dumps(raw_run(**groups) | {"name": name}))
        # The command line refuses what is wrong before there is a flow run; here the server is to be told of it.
        flow = [sys.executable, run_pipeline.__file__] if name in {"unreachable", "no-rows"} else [COMMAND, "run"]
        environment = {**os.environ, "PREFECT_HOME": str(top / "home"), **SECRETS}
        environment.pop("PREFECT_API_URL", None)
        done = subprocess.run([*flow, run_file], cwd=folder, env=environment, capture_output=True, text=True)
        (top / f"{name}.out").write_text(f"{done.returncode}\n{done.stdout}{done.stderr}")
    yield top


def ended(place: Path, name: str) -> str:
    """Exit status of a run, and all that it told."""
    return (place / f"{name}.out").read_text()


def test_runs_end_as_they_should(place: Path) -> None:
    statuses = {path.stem: path.read_text().partition("\n")[0] for path in place.glob("*.out")}
    expected = {"good": "0", "unreachable": "1", "no-rows": "1", "no-proof": "3", "tells-all": "1"}
    assert statuses == expected, "\n".join(ended(place, name) for name in expected)
    for name, of in {"unreachable": "somebody/some-model", "no-rows": "messages[0].content"}.items():
        assert "mcore.errors.InputError" in ended(place, name) and of in ended(place, name)
    log = place / FOLDER / "store" / "runs" / "tells-all" / "evaluate_base" / "stage.log"
    assert "HF_TOKEN=****" in log.read_text() and "with ****" in log.read_text()
    failure = json.loads(log.with_name("failure.json").read_text())
    assert any("HF_TOKEN=****" in line for line in failure["tail"])


def test_no_planted_secret_is_in_any_file_that_was_written(place: Path) -> None:
    files = [path for path in place.rglob("*") if path.is_file() and not path.is_symlink()]
    names = {path.name for path in files}
    written = ("run.json", "process.json", "manifest.json", "report.md", "stage.log", "failure.json", "error.json")
    assert names.issuperset({*written, "metrics.jsonl", "prefect.db"})
    assert [str(path) for path in files if PLANTED in path.read_bytes()] == []


def test_no_planted_secret_is_in_the_servers_database(place: Path) -> None:
    """Row by row too, as a page of the file may break in the middle of a word."""
    with sqlite3.connect(place / "home" / "prefect.db") as database:
        rows = list(database.iterdump())
    text = "\n".join(rows)
    assert PLANTED.decode() not in text
    assert text.count('INSERT INTO "flow_run"') >= 5 and "report-good" in text and "tells-all" in text


def test_nothing_of_a_path_was_run(place: Path) -> None:
    assert not list(place.rglob("ran"))
    link = place / FOLDER / "store" / "runs" / "good" / "model"
    assert link.is_symlink() and (link / "config.json").is_file()


@pytest.mark.parametrize(
    "command", [["status"], ["status", "tells-all"], ["logs", "tells-all", "-n", "0"], ["report", "good"]]
)
def test_commands_show_neither(place: Path, command: list[str]) -> None:
    folder = place / FOLDER
    done = mcore_flows(*command, "--store", folder / "store", cwd=folder, **SECRETS)
    assert done.returncode == 0 and PLANTED.decode() not in done.stdout + done.stderr


def test_the_environment_was_there_to_be_told(place: Path) -> None:
    """The program that tells all does so: what is not found was not missing."""
    script = place / FOLDER / "tells all"
    done = subprocess.run([script], env=os.environ | SECRETS, capture_output=True, text=True)
    assert SECRETS["HF_TOKEN"] in done.stdout and SECRETS["HTTPS_PROXY"] in done.stderr
