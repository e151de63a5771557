"""A stage's time limit, over all the commands that it starts. The commands are small and real."""

import sys
from pathlib import Path

import pytest

from configs.schema.run import RunConfig
from mcore.errors import LaunchError
from tasks.stage import Job

LIMITS = {"timeout_s": 0.5, "stage_timeout_s": {"convert": 4.0}}
SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(2.5)"]


def job(folder: Path, name: str) -> Job:
    raw = {"name": "n", "model": {"source": "m"}, "data": {"dataset": ["d"]}, "train": {"train_iters": 1}}
    run = RunConfig.model_validate({**raw, "launch": LIMITS})
    return Job(run, name, {}, folder / "output", folder, None, sys.executable, lambda line: None)


def test_a_stage_has_its_own_limit_counted_over_all_its_commands(tmp_path: Path) -> None:
    convert = job(tmp_path, "convert")
    convert.launch(SLEEP)
    with pytest.raises(LaunchError, match=r"took longer than 1\.\S+ s and was ended"):
        convert.launch(SLEEP)
    with pytest.raises(LaunchError, match="convert took longer than 4 s"):
        convert.launch(SLEEP)


def test_other_stages_have_the_limit_of_all(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="was ended"):
        job(tmp_path, "export").launch(SLEEP)
