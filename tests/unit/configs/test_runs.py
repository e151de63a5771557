"""Every run file that we ship loads and passes the checks that need no model."""

from pathlib import Path

import pytest

from configs.schema.load import load_run
from configs.schema.suite import load_suite

CONFIGS = Path(__file__).parents[3] / "configs"
RUNS = sorted(CONFIGS.rglob("runs/**/*.yaml"))
SUITES = sorted(CONFIGS.rglob("suites/**/*.yaml"))


def test_there_are_runs_and_suites() -> None:
    assert RUNS and SUITES


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_run_loads_and_its_files_are_there(path: Path) -> None:
    run = load_run(path)
    files = [entry.partition("#")[0] for entry in (*run.data.dataset, *run.data.val_dataset)]
    if run.evaluate:
        files += [run.evaluate.suite, *(entry.partition("#")[0] for entry in run.evaluate.perplexity_dataset)]
    missing = [file for file in files if not (CONFIGS.parent / file).is_file()]
    assert not missing


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_a_suite_loads(path: Path) -> None:
    assert load_suite(path).groups
